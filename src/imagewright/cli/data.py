"""`imagewright data info|convert|downsample|encoder|balance|entries`"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from imagewright.cli.command import dispatch
from imagewright.cli.console import OUT, bar, first_alone, say, table
from imagewright.data import Info, convert, info, open_images
from imagewright.data.curation.balancing import Balance, Rule
from imagewright.data.curation.command import balance, entries_of
from imagewright.data.curation.metadata import PMI, UNIGRAMS
from imagewright.data.downsampling import Format, Job, Preset, downsample
from imagewright.data.fitting import Filter, Fit
from imagewright.metrics.train_encoder import train_encoder
from imagewright.training.distributed import processes
from imagewright.types import UserError

T = TypeVar("T")
HELP = """imagewright data info SOURCE        what a set holds, and whether every file is usable
imagewright data convert SOURCE OUT.zip   one EDM-format zip of PNGs from any set
imagewright data downsample IMAGENET OUT  ImageNet made small as a paper's was, by several processes
imagewright data encoder SOURCE OUT       train what `evaluate --features OUT` compares these images by
imagewright data balance SOURCE OUT       one draw of a set in which common things do not drown rare ones
imagewright data entries TABLE OUT.json   the lists by which captions are balanced, made from captions

SOURCE is digits, emoji64, an EDM-format zip, a folder (with dataset.json, or one sub-folder
per class, also below train, val and test, or flat), an npz of an array of images, CIFAR's or
downsampled ImageNet's batches (a folder, tar or zip of them), or parquet files of the hub.

examples:
  imagewright data info emoji64
  imagewright data info photos/ --skip-bad
  imagewright data convert pictures/ pictures-32.zip --resolution 32
  imagewright data convert photos/ photos-64.zip --resolution 64 --fit crop --holdout 0.1
  imagewright data convert cifar-10-python.tar.gz cifar10-32x32.zip
  imagewright data encoder photos-64.zip photos.safetensors
  imagewright data downsample imagenet/ small/ --size 64 --preset edm --workers 8
  imagewright data balance photos.zip balanced.zip
  imagewright data entries captions.tsv entries.json
  imagewright data balance captions.tsv balanced.tsv --entries entries.json --t 20000
"""


def info_command(
    source: Annotated[str, tyro.conf.Positional],
    resolution: int | None = None,
    skip_bad: bool = False,
) -> None:
    """Show size, classes, splits and pixel statistics of an image set; every file is opened.

    Args:
        source: digits, emoji64, a zip or a folder.
        resolution: look at it reduced to this size.
        skip_bad: count unusable files; otherwise they are an error that names the first ten.
    """
    found = _with_bar("checking", lambda show: info(source, resolution=resolution, on_progress=show))
    if found.skipped and not skip_bad:
        named = "; ".join(f"{name} ({reason})" for name, reason in found.skipped[:10])
        more = f" and {len(found.skipped) - 10} more" if len(found.skipped) > 10 else ""
        raise UserError(f"{source}: {len(found.skipped)} unusable files: {named}{more}; --skip-bad leaves them out")
    _show(found)


def convert_command(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    resolution: int | None = None,
    channels: int | None = None,
    fit: Fit | None = None,
    filter: Filter = "lanczos",
    holdout: float | None = None,
    skip_bad: bool = False,
) -> None:
    """Write any image set as one EDM-format zip (stored PNGs and dataset.json).

    Args:
        source: digits, emoji64, a zip, a folder, or an npz of an array.
        out: the .zip to write.
        resolution: bring to this size; without --fit it must divide the size of every picture.
        fit: of pictures of any shape and size: crop takes the square in the middle, pad puts the whole on a white
            square, squash gives each side a factor of its own.
        filter: of --fit: lanczos, box (area means) or bicubic.
        holdout: share of the pictures that become the test split, by hash of the picture, such as 0.1.
        channels: 1 or 3; default 3 if any picture has colour.
        skip_bad: leave out unusable files; otherwise they are an error that names the first ten.
    """
    if fit is None and filter != "lanczos":
        raise UserError("--filter goes with --fit crop, pad or squash")
    written = _with_bar(
        "converting",
        lambda show: convert(
            source,
            out,
            resolution=resolution,
            channels=channels,
            fit=fit,
            filter=filter,
            holdout=holdout,
            skip_bad=skip_bad,
            on_progress=show,
        ),
    )
    say(f"{len(written)} images written to {out}, {written.preprocessing}; {len(written.skipped)} left out")
    if written.splits is not None:
        say("splits: " + ", ".join(f"{name} {count}" for name, count in sorted(Counter(written.splits).items())))
    _say_unread(written.unread)


def downsample_command(
    source: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    size: int,
    preset: Preset,
    filter: str = "box",
    format: Format = "npz",
    workers: int = os.cpu_count() or 1,
    val_labels: Path | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> None:
    """Make ImageNet, or any folder of classes, small as a paper's data set was; the same command goes on.

    Args:
        source: folder with train and val folders, of a folder for each class.
        out: folder for the result: batches (chrabaszcz), or train.zip and val.zip (edm, adm).
        size: pixels a side.
        preset: chrabaszcz (squashed, box), edm (central square, lanczos), adm (halved, bicubic, central square).
            van-den-oord's program was never published.
        filter: of chrabaszcz: box as published, lanczos, nearest, bilinear, bicubic or hamming.
        format: of chrabaszcz: npz, or pickle for the official readers.
        workers: processes; the result does not depend on it.
        val_labels: classes of a val folder without class folders: the development kit's ground truth.
        seed: of chrabaszcz's shuffle.
        skip_bad: leave out unusable files; otherwise they are an error that names the first ten.
    """
    job = Job(source=source, size=size, preset=preset, filter=filter, format=format, seed=seed, val_labels=val_labels)
    with processes() as group:
        shared = partial(downsample, rank=group.rank, world=group.world, wait=group.wait)
        made = _with_bar(
            "downsampling", lambda show: shared(job, out, workers=workers, skip_bad=skip_bad, on_progress=show)
        )
    if made is None:
        return
    counts = ", ".join(f"{split} {count}" for split, count in made.counts.items())
    say(f"{counts} images, {size}x{size}, preset {preset}; {len(made.skipped)} left out")
    for name, reason in made.skipped[:10]:
        say(f"left out: {name}: {reason}")
    for file in made.files:
        say(f"written to {file}")


def encoder_command(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    resolution: int | None = None,
    steps: int = 2000,
    seed: int = 0,
    skip_bad: bool = False,
) -> None:
    """Train a small encoder of these images, in whose features `imagewright evaluate --features FILE` compares.

    It learns the set's classes; where there are none, to tell each picture from every other, however it is moved.

    Args:
        source: the training images, as of every command.
        out: the NAME.safetensors to write; scores are then called fd_NAME.
        resolution: look at the images reduced to this size.
        steps: of training, of 64 images each.
        seed: of training.
        skip_bad: leave out unusable files.
    """
    images = open_images(source, resolution=resolution, skip_bad=skip_bad)
    record = train_encoder(images, out, steps=steps, seed=seed)
    (share,) = record["accuracy"]["train"].values()
    what = "of its classes" if images.spec.num_classes > 1 else "from all others"
    say(f"written to {out}; of its {record['images']['train']} training images it tells {share:.0%} {what}")


def balance_command(
    source: Annotated[str, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    entries: Path | None = None,
    t: int | None = None,
    tail: float | None = None,
    reference: str = "en",
    rule: Rule = "language",
    seed: int = 0,
) -> None:
    """Write one balanced draw of a set (Meta CLIP 2): rare things are all kept, common ones up to about as many.

    Of a labelled set a class is what is counted; of a table of captions (*.tsv or *.parquet with columns picture,
    caption and language) the entries of each language that a caption holds. An entry of c pictures is kept with
    probability min(1, t / c). OUT.json says counts and thresholds. The same command goes on where it was stopped.

    Args:
        source: a labelled set, of which training pictures are balanced; or a table of captions.
        out: the .zip to write, or of captions the .tsv.
        entries: of captions: JSON of a list of entries for each language (`imagewright data entries`).
        t: pictures up to which all of an entry's are kept, in the reference language; default by --tail.
        tail: share of the reference language's matches that are of such entries; default 0.06.
        reference: the language of --t and --tail.
        rule: every other language's threshold by the same share (language), or the same for all (global).
        seed: of the draw.
    """
    how = Balance(t=t, tail=tail, reference=reference, rule=rule)
    made = _with_bar("balancing", lambda show: balance(source, out, how, entries=entries, seed=seed, on_progress=show))
    rows = table("language", "t", "entries", "matches", "kept", "most before", "most after", "least after")
    for name, before in made.before.items():
        after, t_here = made.after[name], made.record["thresholds"][name]
        there = before > 0
        told = (t_here, there.sum(), before.sum(), after.sum(), before.max(), after.max(), after[there].min())
        rows.add_row(name or "classes", *(f"{int(each):,}" for each in told))
    OUT.print(rows)
    say(f"{made.kept:,} of {made.out_of:,} pictures kept; {made.record['tail']:.1%} of matches are of entries below t")
    if without := made.record.get("without"):
        say(f"{without:,} captions hold no entry of their language's list; they are never kept")
    say(f"written to {out}, and counts to {out}.json")


def entries_command(
    source: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    given: Path | None = None,
    titles: Path | None = None,
    pmi: float = PMI,
    unigrams: float = UNIGRAMS[0],
) -> None:
    """Make the list of entries of each language from a table of captions: numbers, frequent words, pairs, titles.

    Args:
        source: *.tsv or *.parquet with columns picture, caption and language.
        out: the JSON to write.
        given: JSON of entries of each language that come first, such as WordNet's.
        titles: JSON of titles of each language and how often each was viewed.
        pmi: bits of mutual information from which a pair of words is an entry; 30 as published is for 10^9 words.
        unigrams: share of all words that are entries, the most frequent ones.
    """
    lists = entries_of(source, out, given=given, titles=titles, least_pmi=pmi, unigrams=unigrams)
    for language, each in lists.items():
        say(f"{language or 'no language'}: {len(each):,} entries")
    say(f"written to {out}")


def _with_bar(what: str, work: Callable[[Callable[[int, int], None]], T]) -> T:
    """Run work that reports (done, total), whose total is not known beforehand."""
    with bar(what, 1, "files") as advance_to:
        return work(lambda done, total: advance_to(done, total=total))


def _show(found: Info) -> None:
    spec = found.spec
    size = f"{found.count} images, {spec.resolution}x{spec.resolution}, {spec.channels} channels"
    say(f"{found.source}\n{size}")
    say("splits: " + ", ".join(f"{name} {count}" for name, count in found.per_split.items()))
    say(f"pixels in [-1, 1]: mean {found.mean:.3f}, standard deviation {found.std:.3f} (sigma_data)")
    say(f"fingerprint: {found.fingerprint}")
    if found.per_class:
        rows = table("class", "name", "images")
        for index, count in enumerate(found.per_class):
            name = spec.class_names[index] if index < len(spec.class_names) else ""
            rows.add_row(str(index), name, str(count))
        OUT.print(rows)
    for name, reason in found.skipped:
        say(f"left out: {name}: {reason}")
    _say_unread(found.unread)


def _say_unread(names: Sequence[str]) -> None:
    """Name what lies beside the pictures."""
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        say(f"no pictures, not read: {', '.join(names[:10])}{more}")


COMMANDS: Mapping[str, Callable[..., None]] = {
    "info": info_command,
    "convert": convert_command,
    "downsample": downsample_command,
    "encoder": encoder_command,
    "balance": balance_command,
    "entries": entries_command,
}


def main(args: Sequence[str]) -> None:
    """Dispatch; what is no `downsample` is one process's work, the first's."""
    if list(args[:1]) != ["downsample"] and not first_alone():
        return
    dispatch(COMMANDS, args, "imagewright data", HELP)
