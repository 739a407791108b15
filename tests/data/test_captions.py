"""Captioned sets: the stand-in's law, tables and what is wrong with them, passes that are drawn anew, commands."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imagewright.cli.main import main
from imagewright.data import Loader, open_images
from imagewright.data.caption_tables import read_captions, read_lists, read_prompts, write_tsv
from imagewright.data.captions import CaptionsConfig, one_each, open_table
from imagewright.data.config import DataConfig
from imagewright.data.curation.balancing import Balance
from imagewright.data.curation.labelled import balanced
from imagewright.data.standin_captions import SHARES, standin_captions
from imagewright.types import UserError

pytest.importorskip("ahocorasick")
ENTRIES = {"en": ["red", "blue"], "zh": ["红"]}
ROWS = [("a.png", "a red square", "en"), ("a.png", "红色", "zh"), ("b.png", "blue", "en"), ("b.png", "red, blue", "en")]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for name, colour in (("a", 0), ("b", 255)):
        Image.new("RGB", (10, 8), (colour, 0, 9)).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.tsv").write_text(write_tsv(ROWS))
    (tmp_path / "entries.json").write_text(json.dumps(ENTRIES))
    return tmp_path / "pairs.tsv"


# --- the stand-in -----------------------------------------------------------------------------------------------------


def test_the_stand_in_has_its_law() -> None:
    found = standin_captions("digits", None, 3000, 0)
    n = len(found.captions)
    for language, share in SHARES.items():
        assert found.languages.count(language) / n == pytest.approx(share, abs=3 * (share * (1 - share) / n) ** 0.5)
        at = np.array([each == language for each in found.languages]) & (found.concept >= 0)
        counts = np.bincount(found.concept[at], minlength=10)[found.order[language]]
        law = (1 / np.arange(1, 11)) / (1 / np.arange(1, 11)).sum()
        assert np.abs(counts / counts.sum() - law).max() < 4 * (0.25 / at.sum()) ** 0.5
    assert len({tuple(order) for order in found.order.values()}) == 3, "another head in each language"
    assert (found.concept < 0).mean() == pytest.approx(0.1, abs=0.02)
    both = [sum(name in caption.split() for name in found.lists["en"][:10])
            for caption, language in zip(found.captions, found.languages) if language == "en"]  # fmt: skip
    assert Counter(both)[2] / len(both) == pytest.approx(0.1, abs=0.03)


def test_a_caption_is_a_function_of_seed_and_number() -> None:
    whole, some, other = (standin_captions("digits", None, n, seed) for n, seed in ((50, 0), (20, 0), (20, 1)))
    assert some.captions == whole.captions[:20] and some.picture.tolist() == whole.picture[:20].tolist()
    assert some.captions != other.captions


def test_pictures_show_what_captions_name_and_none_is_held_out() -> None:
    found = standin_captions("emoji64", 16, 200, 3)
    told = found.concept >= 0
    assert (found.images.labels[found.picture[told]] == found.concept[told]).all()
    assert not {*found.images.digests} & {*found.held_out.digests}
    assert len({*np.bincount(found.held_out.labels).tolist()}) == 1
    with pytest.raises(UserError, match=r"data\.pictures is 'cats'"):
        standin_captions("cats", None, 1, 0)


# --- passes -----------------------------------------------------------------------------------------------------------


def test_every_pass_draws_anew_and_again_the_same() -> None:
    data = CaptionsConfig(pairs=400, length=10).open()
    assert data.keep is not None and data.curation is not None
    kept = [data.passing(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert kept[0].tolist() == kept[1].tolist() != kept[2].tolist()
    mean = np.mean([len(data.passing(np.random.default_rng(seed))) for seed in range(200)])
    assert mean == pytest.approx(data.keep.sum(), abs=3 * (data.keep * (1 - data.keep)).sum() ** 0.5 / 200**0.5)
    assert (data.keep[[not caption.strip() for caption in data.pairs.captions]] == 0).all()
    whole = CaptionsConfig(pairs=400, length=10, balance="none").open()
    assert len(whole.passing(np.random.default_rng(0))) == 400
    assert whole.fingerprint != data.fingerprint != CaptionsConfig(pairs=400, length=10, seed=1).open().fingerprint


def test_a_loader_goes_through_passes_of_all_lengths() -> None:
    data = CaptionsConfig(pairs=300, length=10).open()
    loader = Loader(data, 16, seed=5)
    rows = [data.passing(np.random.Generator(np.random.PCG64(np.random.SeedSequence((5, e, 0))))) for e in range(3)]
    ends = np.cumsum([len(each) for each in rows])
    assert len({*np.diff([0, *ends])}) > 1
    tokens = [loader.batch(int(p), int(n)).tokens.tolist() for p, n in ((0, ends[0]), (ends[0], ends[1] - ends[0]))]
    for seen, wanted in zip(tokens, rows, strict=False):
        said = data.batch(data.read(wanted), wanted, lambda: np.zeros(0)).tokens.tolist()
        assert sorted(seen) == sorted(said)
    across = loader.batch(int(ends[0]) - 2, 5).tokens.tolist()
    assert across == tokens[0][-2:] + tokens[1][:3]
    assert (
        Loader(data, 16, seed=5).batch(int(ends[1]) + 3, 4).tokens.tolist()
        == loader.batch(int(ends[1]) + 3, 4).tokens.tolist()
    )


def test_one_caption_of_a_picture_is_chosen_evenly() -> None:
    groups = np.array([0, 0, 0, 4, 7, 7])
    rng = np.random.default_rng(0)
    chosen = np.stack([one_each(groups, rng.random(6)) for _ in range(3000)])
    assert (groups[chosen] == [0, 4, 7]).all()
    assert np.bincount(chosen[:, 0]) / 3000 == pytest.approx([1 / 3] * 3, abs=0.03)


def test_of_a_pictures_captions_those_without_an_entry_are_not_chosen(table: Path) -> None:
    rows = [("a.png", "red", "en"), *[("a.png", "nothing", "en")] * 9, ("b.png", "more", "sv")]
    table.write_text(write_tsv(rows))
    balanced_set = CaptionsConfig(source=str(table), metadata="entries.json", resolution=4, t=9, length=6).open()
    assert all(balanced_set.passing(np.random.default_rng(seed)).tolist() == [0] for seed in range(9))
    out = table.with_name("out.tsv")
    main(["data", "balance", str(table), str(out), "--entries", str(table.with_name("entries.json")), "--t", "9"])
    assert read_captions(out)[1] == ["red"]


def test_labelled_pictures_are_balanced_by_their_classes() -> None:
    images = open_images("emoji64", resolution=8)
    found, curation = balanced(images, Balance(t=60))
    counts = np.bincount(images.labels)
    shown = np.mean([np.bincount(images.labels[found.passing(np.random.default_rng(s))]) for s in range(100)], axis=0)
    np.testing.assert_allclose(shown, np.minimum(counts, 60), atol=3.5)
    assert curation.thresholds == {"": 60} and found.fingerprint != images.fingerprint
    part = found.subset(np.array([900, 3]))
    assert part.keep.tolist() == found.keep[[900, 3]].tolist() and part.keep[0] != part.keep[1]
    assert replace(found, keep=found.keep / 2).fingerprint != found.fingerprint
    unnamed, _ = balanced(replace(images, labels=np.where(images.labels == 2, -1, images.labels)), Balance(t=60))
    assert not unnamed.keep[images.labels == 2].any(), "pictures without a class are never shown"
    assert DataConfig(source="digits", balance=0.2).open().keep.max() == 1
    with pytest.raises(UserError, match="no classes to balance"):
        balanced(open_images("digits", labels=False), Balance())
    with pytest.raises(UserError, match=r"goes with data\.labels"):
        DataConfig(source="digits", labels=False, balance=0.1)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_names_pictures_of_its_folder(table: Path) -> None:
    images, pairs = open_table(table, None, 4)
    assert [images.names[i] for i in pairs.picture] == ["a.png", "a.png", "b.png", "b.png"]
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # as some spreadsheets write it
    assert read_captions(table)[1] == [ROWS[i][1] for i in range(4)]
    assert images.spec.resolution == 4 and pairs.whole.tolist() == pairs.picture.tolist()
    config = CaptionsConfig(source=str(table), resolution=4, metadata="entries.json", length=6)  # beside the table
    found = config.open()
    assert found.keep is not None and found.curation is not None
    assert {k: v.tolist() for k, v in found.curation.counts.items()} == {"en": [2, 2], "zh": [1]}
    assert found.spec.num_classes == 0 and len(found.passing(np.random.default_rng(0))) == 2
    with pytest.raises(UserError, match="needs the entries of each language"):
        CaptionsConfig(source=str(table), resolution=4).open()
    only = CaptionsConfig(source=str(table), resolution=4, languages=("zh",), balance="none", length=6).open()
    assert len(only) == 1
    with pytest.raises(UserError, match="no caption is in 'fr'; there are en, zh"):
        CaptionsConfig(source=str(table), resolution=4, languages=("fr",), balance="none").open()
    with pytest.raises(UserError, match="has captions and no classes"):
        config.held_out()


def test_what_a_table_does_not_name_decides_nothing(table: Path) -> None:
    (table.parent / "half.png").write_bytes((table.parent / "a.png").read_bytes()[:-30])
    (table.parent / "tall.png").write_bytes((table.parent / "a.png").read_bytes())
    images, pairs = open_table(table, None, 4)
    assert {images.names[i] for i in pairs.picture} == {"a.png", "b.png"}
    table.write_text(table.read_text() + "half.png\tred\ten\n")
    with pytest.raises(UserError, match=r"names 1 unusable pictures: half\.png: "):
        open_table(table, None, 4)
    for name in ("a", "b", "half"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(table.parent / f"{name}.png")
    assert len(open_table(table)[0]) == 3  # tall.png is no square, and is not asked
    table.write_text(table.read_text() + "tall.png\tred\ten\n")
    with pytest.raises(UserError, match=r"names 1 unusable pictures: tall\.png: is 10x8"):
        open_table(table)


def test_parquet_tables_are_read_alike(table: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ("picture", "caption", "language")
    columns = {name: [row[i] for row in ROWS] for i, name in enumerate(names)}
    path = table.with_suffix(".parquet")
    parquet.write_table(arrow.table(columns), path)
    assert read_captions(path) == read_captions(table)
    images, pairs = open_table(path, None, 4)  # in the folder of its pictures, where it is none of them
    assert [images.names[i] for i in pairs.picture] == ["a.png", "a.png", "b.png", "b.png"]
    parquet.write_table(arrow.table({"picture": ["a"]}), path)
    with pytest.raises(UserError, match="it needs picture, caption, language"):
        read_captions(path)
    path.write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(UserError, match="no readable parquet file"):
        read_captions(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has columns none"), ("picture\tcaption\n", "has columns picture, caption"),
        ("picture\tcaption\tlanguage\na.png\tx\n", "line 2 has 2 columns"),
        ("picture\tcaption\tlanguage\n", "holds no captions"),
        ("picture\tcaption\tlanguage\na.png\t\ten\n", "row 1 has no caption"),
        ("picture\tcaption\tlanguage\nz.png\tx\ten\n", "names 1 pictures that .* does not hold: z.png"),
        ("picture\tpicture\tcaption\tlanguage\n", "each once"), (b"\xff\xfe", "no text in UTF-8"),
        ("picture\tcaption\tlanguage\na.png\t" + "x" * 140_000 + "\ten\n", "no readable table: field larger"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused_in_a_sentence(table: Path, content: str | bytes, said: str) -> None:
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=said):
        open_table(table, None, 4)


def test_damaged_lists_and_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("[]", '{"en": "cat"}', "{}", "{"):
        path.write_text(content)
        with pytest.raises(UserError):
            read_lists(path)
    for content in ("{}", '{"en": {"templates": ["{}"]}}', '{"en": {"templates": ["x"], "classes": ["a"]}}',
                    '{"en": {"templates": [], "classes": ["a"]}}'):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError):
            read_prompts(path)
    with pytest.raises(UserError, match=r"end in \.tsv or \.parquet"):
        read_captions(tmp_path / "x.csv")


@pytest.mark.parametrize(
    "wrong",
    [{"balance": "some"}, {"t": 0}, {"balance": "none", "t": 5}, {"balance": "none", "reference": "de"},
     {"length": 1}, {"prompts": "x"}, {"source": "a.tsv", "pairs": 9}, {"zipf": -1}],
)  # fmt: skip
def test_settings_out_of_range_or_without_effect_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError):
        CaptionsConfig(**wrong)  # type: ignore[arg-type]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_captions_are_balanced_by_a_command_that_goes_on(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagewright.data.curation.command.PIECE", 3)
    rows = [(f"{i}.png", "red" if i % 10 else "blue", "en") for i in range(198)] + [("x.png", "green", "en")]
    table.write_text(write_tsv(rows))
    out, entries = tmp_path / "out.tsv", str(tmp_path / "entries.json")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("imagewright.data.curation.command.curated", stopped)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["data", "balance", str(table), str(out), "--entries", entries, "--t", "20"])
    assert not out.exists() and len(list((tmp_path / "out.parts").iterdir())) == 67, "the last of one caption"
    with monkeypatch.context() as patched:
        patched.setattr("imagewright.data.captions.Pairs.match", stopped)
        main(["data", "balance", str(table), str(out), "--entries", entries, "--t", "20"])
    said = capsys.readouterr().out
    kept = read_captions(out)[1]
    assert kept.count("blue") == 20 and 8 < kept.count("red") < 36 and "green" not in kept
    assert "1 captions hold no entry" in said and not (tmp_path / "out.parts").exists()
    record = json.loads((tmp_path / "out.tsv.json").read_text())
    assert record["thresholds"] == {"en": 20} and record["counts"]["en"]["before"] == [178, 20]
    assert record["names"]["en"] == ["red", "blue"] and (record["pictures"], record["kept"]) == (199, len(kept))


def test_a_tables_rows_may_stand_in_any_order(table: Path, tmp_path: Path) -> None:
    """Every row that is kept is one of the table's, at most one of a picture; both entries of a caption count."""
    rows = [(f"{i % 5}.png", f"red blue {i}" if i % 2 else f"红 {i}", "en" if i % 2 else "zh") for i in range(30)]
    table.write_text(write_tsv(rows))
    out = tmp_path / "out.tsv"
    main(["data", "balance", str(table), str(out), "--entries", str(tmp_path / "entries.json"), "--t", "99"])
    kept = list(zip(*read_captions(out), strict=True))
    assert {*kept} <= {*rows} and sorted(name for name, *_ in kept) == [f"{i}.png" for i in range(5)]
    english = sum(language == "en" for *_, language in kept)
    after = {
        name: each["after"] for name, each in json.loads((tmp_path / "out.tsv.json").read_text())["counts"].items()
    }
    assert 0 < english < 5 and after == {"en": [english, english], "zh": [5 - english]}


def test_labels_are_balanced_by_a_command(tmp_path: Path) -> None:
    out = tmp_path / "out.zip"
    main(["data", "balance", "digits", str(out), "--t", "80"])
    before, after = (open_images(source, split="all") for source in ("digits", str(out)))
    assert before.splits is not None and after.splits is not None
    assert Counter(before.splits)["test"] == Counter(after.splits)["test"], "others' pictures stay"
    counts = np.bincount(after.labels[[each == "train" for each in after.splits]])
    assert counts.min() > 50 and counts.max() < 110
    record = json.loads((tmp_path / "out.zip.json").read_text())
    assert record["counts"][""]["after"] == counts.tolist()


def test_entries_are_made_by_a_command_and_wrong_uses_are_told(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"zh": ["狗"]}))
    main(["data", "entries", str(table), str(tmp_path / "made.json"), "--unigrams", "1", "--given", str(given)])
    made = read_lists(tmp_path / "made.json")
    assert "red" in made["en"] and "红" in made["zh"] and "0" in made["zh"]
    assert "红" not in made["en"] and made["zh"][100] == "狗" and "狗" not in made["en"]
    for words, said in (
        (["balance", str(table), "out.tsv"], "give them with --entries"),
        (["balance", "digits", "out.zip", "--entries", str(tmp_path / "made.json")], "no table of captions"),
        (["balance", str(table), "out.zip", "--entries", str(tmp_path / "made.json")], "has to end in .tsv"),
        (["balance", "digits", "out.zip", "--tail", "2"], "--tail"),
        (["balance", "digits", "out.zip", "--rule", "global"], "--rule global has no effect"),
        (["balance", "digits", "out.zip", "--reference", "de"], "there are labels, which are of no language"),
    ):
        with pytest.raises(SystemExit):
            main(["data", *words])
        assert said in capsys.readouterr().err
