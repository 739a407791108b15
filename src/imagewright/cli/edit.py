"""`imagewright edit MODEL --task ...`: fill in, extend, colour, enlarge, redraw, blend and denoise pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor

from imagewright import limits
from imagewright.cli.command import run
from imagewright.cli.console import say
from imagewright.cli.edit_latents import check_task, places, put_back
from imagewright.cli.edit_tokens import at_own_size, check_model, fill_tokens
from imagewright.cli.scoring import real_images
from imagewright.data import from_uint8, to_uint8
from imagewright.data.pixels import BadPicture, Pixels, box_reduce, decode, with_channels
from imagewright.files import read_bytes, write_json
from imagewright.models.files import ModelFile, weights_hash
from imagewright.models.weighted import at_weight
from imagewright.noise import ImageNoise
from imagewright.pretrained import find_model
from imagewright.samplers import MultistepConsistency, editing
from imagewright.samplers.editing import Editing, Known, between, denoised, editing_levels
from imagewright.samplers.generator import ImageGenerator, generator_from
from imagewright.samplers.token_editing import Outpainting
from imagewright.training.distributed import pick_device
from imagewright.training.snapshots import grid, save_image
from imagewright.types import Condition, DataSpec, UserError, kind_of

Task = Literal["inpaint", "outpaint", "colourise", "upscale", "stroke", "interpolate", "denoise"]
Array = npt.NDArray[np.uint8]

MASKS = ("left", "right", "top", "bottom", "centre")
STROKE_LEVELS = (5.38, 2.24)
"""The paper's, whose pictures have 256 pixels, as seen through blocks of 32; smaller blocks get them in proportion."""
STEPS = 20
SIGMA = 0.5
TAKES = {
    "mask": ("inpaint", "outpaint"),
    "factor": ("upscale",),
    "sigma": ("denoise",),
    "steps": ("inpaint", "outpaint", "colourise", "upscale", "stroke"),
    "levels": ("inpaint", "outpaint", "colourise", "upscale", "stroke"),
    "image": ("inpaint", "outpaint", "colourise", "upscale", "stroke", "denoise"),
    "index": ("inpaint", "outpaint", "colourise", "upscale", "stroke", "denoise"),
    "data": ("inpaint", "outpaint", "colourise", "upscale", "stroke", "denoise"),
}
"""The tasks in which each option has an effect."""
EPILOG = """tasks:
  inpaint      fill the pixels of --mask; with --label, as a part of a picture of that class
  outpaint     go on beyond the side --mask (left, right, top, bottom), by half of the picture
  colourise    from the grey levels of a picture
  upscale      from the means of blocks of --factor pixels, or from a picture that is that much smaller
  stroke       from a rough drawing to a picture, by noise up to the highest of --levels and back
  interpolate  the way from one drawn picture of --seed to another
  denoise      noise of deviation --sigma is added, and removed in one step

A flow map (a consistency or trajectory model) does all of them, a token model the first two; a causal one draws what
is missing from what stands before it alone.

examples:
  imagewright edit runs/cd-digits --task inpaint --index 3 --mask bottom
  imagewright edit runs/maskgit-digits --task inpaint --index 3 --mask top --label 5
  imagewright edit runs/cd-digits --task upscale --image small.png --factor 2 --label 7
  imagewright edit runs/cd-digits --task interpolate --label 8 --n 10
"""


@dataclass(frozen=True)
class Picture:
    """What is edited: uint8 [H, W, C], and its class if known."""

    pixels: Pixels
    label: int | None = None


def edit(
    model: Annotated[str, tyro.conf.Positional],
    task: Task,
    image: Path | None = None,
    index: int | None = None,
    mask: str | None = None,
    factor: int | None = None,
    sigma: float | None = None,
    steps: int | None = None,
    levels: tuple[float, ...] | None = None,
    n: int = 4,
    seed: int = 0,
    label: int | None = None,
    class_name: str | None = None,
    weight: float | None = None,
    data: str | None = None,
    out: Path = Path("edits"),
    device: str = "auto",
) -> None:
    """Edit a picture with a model that was never trained for it.

    Writes a row (picture, what the model was given, results) as TASK.png into --out, and each result as TASK-0.png ...
    Result i of a seed is always the same.

    Args:
        model: run or model folder of a flow map that jumps to the clean image, or of a token model.
        task: inpaint, outpaint, colourise, upscale, stroke, interpolate, denoise.
        image: picture of the model's size (upscale: or smaller by the factor).
        index: in place of --image: which picture of the model's held-out data.
        mask: what to fill: left, right, top, bottom, centre, or a picture of the model's size, white = fill; default
            right.
        factor: side of the blocks whose means are known; default 2.
        sigma: deviation of the noise that is added and removed, a colour range being 2; default 0.5.
        steps: of a flow map: noise levels of the loop, on EDM's grid, default 20; of a masked token model:
            passes of the decoding, default 12, of which the first sixth is skipped; of one of random orders (ARPG):
            passes, default those that it samples in.
        levels: the noise levels themselves, decreasing; default of stroke: two, by the picture's
            size.
        n: results, or pictures on the way of an interpolation.
        seed: of the noise.
        label: class index, -1 = none; default that of the picture at --index.
        class_name: the class by name.
        weight: strength of the guidance, of a model that is told it; default its own.
        data: where --index looks; default what the model was trained on.
        out: folder for the pictures.
        device: auto, cpu, cuda, mps.
    """
    given = {"image": image, "index": index, "mask": mask, "factor": factor, "sigma": sigma, "steps": steps,
             "levels": levels, "data": data}  # fmt: skip
    _check(task, given, n, seed)
    file = find_model(model)
    file = file if weight is None else replace(file, model=at_weight(file.model, weight))
    check_model(model, file.model, task, given)
    check_task(model, file, task)
    file = at_own_size(file)
    generator = generator_from(file, device=pick_device(device))
    noise = ImageNoise(seed, range(n))
    if task == "interpolate":
        picked = _label(file.spec, label, class_name, _drawn_label(generator, seed))
        row = results = _interpolate(generator, seed, n, picked)
    else:
        picture = _picture(model, file, task, image, index, data, factor or 2)
        picked = _label(file.spec, label, class_name, picture.label)
        shown, results = _edited(file, generator, task, picture, given, noise, n, picked)
        row = np.concatenate([shown, results])
    scale = max(1, 64 // file.spec.resolution)
    save_image(out / f"{task}.png", grid(row, len(row)), scale=scale)
    for i, result in enumerate(results):
        save_image(out / f"{task}-{i}.png", result)
    _record(out / f"{task}.json", model, file, task, given | {"weight": weight}, n, seed, picked)
    say(f"{len(results)} results in {out}; row: {out / f'{task}.png'}")


def _check(task: str, given: dict[str, Any], n: int, seed: int) -> None:
    """Refuse options that have no effect, or that do not go together."""
    if task == "interpolate" and n < 2:
        raise UserError("--n is 1; an interpolation has at least 2 pictures, its ends")
    for name, tasks in TAKES.items():
        if given[name] is not None and task not in tasks:
            raise UserError(f"--{name} has no effect on --task {task}; it goes with {', '.join(tasks)}")
    if given["steps"] is not None and given["levels"] is not None:
        raise UserError("--steps and --levels do not go together; give one of them")
    if task != "interpolate" and (given["image"] is None) == (given["index"] is None):
        raise UserError(f"--task {task} needs one picture: either --image FILE or --index N")
    if given["data"] is not None and given["index"] is None:
        raise UserError("--data says where --index looks; it has no effect on --image")


def _picture(
    model: str, file: ModelFile, task: str, image: Path | None, index: int | None, data: str | None, factor: int
) -> Picture:
    """The picture to edit, at the model's size and in its colours."""
    spec = file.spec
    if task == "colourise" and spec.channels != 3:
        raise UserError(f"{model} makes grey pictures; --task colourise needs a model of three channels")
    if task == "upscale" and (factor < 2 or spec.resolution % factor):
        raise UserError(f"--factor is {factor}; it must be at least 2 and divide the model's {spec.resolution} pixels")
    if image is None:
        assert index is not None
        images = real_images(model, data, spec, "test")
        if not 0 <= index < len(images):
            raise UserError(f"--index is {index}; there are {len(images)} held-out pictures, 0 to {len(images) - 1}")
        known = int(images.labels[index])
        return Picture(images.images([index])[0], known if 0 <= known < spec.num_classes else None)
    pixels = with_channels(_read(image), spec.channels)
    allowed = [spec.resolution, *([spec.resolution // factor] if task == "upscale" else [])]
    if pixels.shape[:2] not in [(side, side) for side in allowed]:
        sizes = " or ".join(f"{side}x{side}" for side in allowed)
        raise UserError(f"{image} has {pixels.shape[1]}x{pixels.shape[0]} pixels; the model needs {sizes}")
    times = spec.resolution // len(pixels)
    return Picture(pixels.repeat(times, 0).repeat(times, 1))


def _read(path: Path) -> Pixels:
    try:
        return decode(read_bytes(path, limits.PICTURE_BYTES))
    except BadPicture as error:
        raise UserError(f"{path}: {error}") from None


def _mask(name: str, spec: DataSpec) -> Tensor:
    """True where the picture is to be filled, [H, W]."""
    side = spec.resolution
    fill, half, quarter = torch.zeros(side, side, dtype=torch.bool), side // 2, side // 4
    match name:
        case "left":
            fill[:, :half] = True
        case "right":
            fill[:, half:] = True
        case "top":
            fill[:half] = True
        case "bottom":
            fill[half:] = True
        case "centre":
            fill[quarter : side - quarter, quarter : side - quarter] = True
        case _:
            if not Path(name).is_file():
                raise UserError(f"--mask is {name!r}; it must be one of {', '.join(MASKS)}, or a picture file")
            pixels = with_channels(_read(Path(name)), 1)[..., 0]
            if pixels.shape != (side, side):
                raise UserError(f"{name} has {pixels.shape[1]}x{pixels.shape[0]} pixels; the model needs {side}x{side}")
            fill = torch.from_numpy(pixels >= 128)
            if not fill.any():
                raise UserError(f"{name} has no white pixels; there would be nothing to fill")
    return fill


def _edited(
    file: ModelFile,
    generator: ImageGenerator,
    task: str,
    picture: Picture,
    given: dict[str, Any],
    noise: ImageNoise,
    n: int,
    label: int,
) -> tuple[Array, Array]:
    """(picture and what the model is given of it; n results), each uint8 [., H, W, C]."""
    spec = generator.spec
    whole = from_uint8(picture.pixels[None])
    same = generator.encoded(whole).repeat(n, 1, 1, 1)
    clip = generator.space is None
    flow_map: Any = generator.model
    cond = _condition(generator, n, label)
    if task == "denoise":
        sigma = SIGMA if given["sigma"] is None else given["sigma"]
        noisy = same + sigma * noise.normal(same)
        # One noisy picture is shown, that of the first result.
        results = generator.decoded(denoised(flow_map, noisy, sigma, cond, clip=clip))
        return np.concatenate([to_uint8(whole), to_uint8(generator.decoded(noisy[:1]))]), to_uint8(results)
    if task in ("inpaint", "outpaint"):
        return _filled(file, generator, task, whole.repeat(n, 1, 1, 1).to(generator.device), given, noise, cond)
    known = _known(task, spec, given)
    if task == "stroke" and given["index"] is not None:
        whole_drawing = from_uint8(_drawn(picture.pixels)[None])
        same = generator.encoded(whole_drawing).repeat(n, 1, 1, 1)
    shown = _shown(task, generator.decoded(same[:1]).cpu(), known)
    sigmas = _levels(task, flow_map, spec, given)
    results = generator.decoded(Editing(sigmas=sigmas, clip=clip)(flow_map, same, known, cond, noise=noise))
    return np.concatenate([to_uint8(whole), to_uint8(shown)]), to_uint8(results)


def _filled(
    file: ModelFile,
    generator: ImageGenerator,
    task: str,
    pictures: Tensor,
    given: dict[str, Any],
    noise: ImageNoise,
    cond: Condition,
) -> tuple[Array, Array]:
    """As `_edited`, of the tasks that both kinds of model know: one picture n times, in which a region is to be drawn.

    Extended pictures are half as large again, and shown beside the picture with its free part white.
    """
    side = generator.spec.resolution
    beyond = _beyond(given["mask"]) if task == "outpaint" else None
    region = beyond.region(side, side) if beyond else _mask(given["mask"] or "right", generator.spec)
    canvas = beyond.canvas(pictures) if beyond else pictures
    results = _redrawn(file, generator, canvas, region, given, noise, cond)
    before, free = pictures[:1], torch.ones_like(pictures[:1])
    if beyond:
        shown = beyond.join(before, torch.where(region.to(free.device), free, canvas[:1]))
        return to_uint8(shown), to_uint8(beyond.join(pictures, results))
    shown = torch.cat([before, before * ~region.to(before.device)])
    return to_uint8(shown), to_uint8(results)


def _redrawn(
    file: ModelFile,
    generator: ImageGenerator,
    canvas: Tensor,
    region: Tensor,
    given: dict[str, Any],
    noise: ImageNoise,
    cond: Condition,
) -> Tensor:
    """Pictures [N, C, H, W] with the region [H, W] drawn anew, as each kind of model does it."""
    if kind_of(generator.model) == "token_model":
        return fill_tokens(replace(file, model=generator.model), canvas, region, cond, noise, given["steps"])
    flow_map: Any = generator.model
    sigmas = _levels("inpaint", flow_map, generator.spec, given)
    editor = Editing(sigmas=sigmas, clip=generator.space is None)
    known = editing.Pixels(~places(region, generator.space))
    made = generator.decoded(editor(flow_map, generator.encoded(canvas), known, cond, noise=noise))
    return made if generator.space is None else put_back(made, canvas, region)


def fill_in(
    name: str, file: ModelFile, generator: ImageGenerator, image: Pixels, region: Tensor, label: int, seed: int
) -> Pixels:
    """A picture, uint8 [H, W, C], with a region, bool [H, W], drawn anew as a part of a picture of the class.

    As `imagewright edit NAME --task inpaint` with the seed and its usual steps; label: -1 = none. Raises UserError
    for a model that cannot.
    """
    given = {"steps": None, "levels": None}
    check_model(name, file.model, "inpaint", given)
    canvas = from_uint8(image[None]).to(generator.device)
    noise, cond = ImageNoise(seed, [0]), _condition(generator, 1, label)
    made: Pixels = to_uint8(_redrawn(at_own_size(file), generator, canvas, region, given, noise, cond))[0]
    return made


def _beyond(side: str | None) -> Outpainting:
    if side not in (None, "left", "right", "top", "bottom"):
        raise UserError(f"--mask is {side!r}; --task outpaint goes on beyond left, right, top or bottom")
    return Outpainting("right" if side is None else side)  # type: ignore[arg-type]  # one of the four


def _known(task: str, spec: DataSpec, given: dict[str, Any]) -> Known:
    match task:
        case "colourise":
            return editing.Luma()
        case "upscale":
            return editing.BlockMeans(given["factor"] or 2)
        case _:
            return editing.Nothing()


def _shown(task: str, picture: Tensor, known: Known) -> Tensor:
    """What the model is given, as one would draw it."""
    match task:
        case "stroke":
            return picture
        case "colourise":
            return (picture * picture.new_tensor(editing.LUMA)[:, None, None]).sum(1, keepdim=True).expand_as(picture)
        case _:
            return known(picture)


def _stroke_block(side: int) -> int:
    """Pixels of a stroke's width: about an eighth of the picture's side, at least 2, a divisor."""
    return next(block for block in range(min(max(2, side // 8), side), side + 1) if side % block == 0)


def _drawn(pixels: Pixels) -> Pixels:
    """A rough drawing of a picture: blocks of a stroke's width in four tones a channel."""
    side = len(pixels)
    block = _stroke_block(side)
    coarse = box_reduce(pixels, side // block).astype(np.int64)
    tones: Pixels = ((2 * coarse * 3 + 255) // 510 * 85).astype(np.uint8)
    return tones.repeat(block, 0).repeat(block, 1)


def _levels(task: str, flow_map: Any, spec: DataSpec, given: dict[str, Any]) -> tuple[float, ...]:
    if given["levels"] is not None:
        return tuple(given["levels"])
    steps: int | None = given["steps"]
    if task != "stroke":
        return editing_levels(flow_map, STEPS if steps is None else steps)
    scaled = tuple(level * _stroke_block(spec.resolution) / 32 for level in STROKE_LEVELS)
    return scaled if steps is None else editing_levels(flow_map, steps, scaled[0])


def _interpolate(generator: ImageGenerator, seed: int, n: int, label: int) -> Array:
    """From image 0 of the seed to image 1, through the noises between."""
    ends = ImageNoise(seed, [0, 1]).normal(torch.empty(2, *generator.seen.shape))
    latents = between(ends[0], ends[1], torch.linspace(0, 1, n)).to(generator.device)
    flow_map: Any = generator.model
    jump = MultistepConsistency(clip=generator.space is None)
    return to_uint8(generator.decoded(jump(flow_map, latents, _condition(generator, n, label))))


def _condition(generator: ImageGenerator, n: int, label: int) -> Condition:
    if not generator.spec.num_classes:
        return Condition()
    return Condition(label=torch.full((n,), label, dtype=torch.int64, device=generator.device))


def _drawn_label(generator: ImageGenerator, seed: int) -> int | None:
    drawn = generator.labels(1, seed)
    return None if drawn is None else int(drawn[0])


def _label(spec: DataSpec, label: int | None, class_name: str | None, found: int | None) -> int:
    """The class asked for, else the one that was found. Raises UserError where there is neither, or no such class."""
    if label is not None and class_name is not None:
        raise UserError("--label and --class-name do not go together; give one of them")
    if class_name is not None:
        if class_name not in spec.class_names:
            names = ", ".join(spec.class_names) or "none"
            raise UserError(f"this model has no class {class_name!r}; its classes are {names}")
        return spec.class_names.index(class_name)
    if label is not None:
        if not -1 <= label < spec.num_classes:
            allowed = f"-1 to {spec.num_classes - 1}" if spec.num_classes else "-1 (the model has no classes)"
            raise UserError(f"--label {label} is not a class of this model; allowed: {allowed}")
        return label
    if found is None and spec.num_classes:
        raise UserError(
            f"this model draws by class; say what the picture shows with --label 0 to {spec.num_classes - 1}, or "
            "--class-name (-1: no class, for models trained with label dropout)"
        )
    return -1 if found is None else found


def _record(
    path: Path, model: str, file: ModelFile, task: str, given: dict[str, Any], n: int, seed: int, label: int
) -> None:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in given.items() if v is not None}
    sha = weights_hash(file.model.state_dict())
    write_json(
        path,
        {"model": model, "weights_sha256": sha, "task": task, "n": n, "seed": seed, "label": label, **options},
    )


COMMANDS: Mapping[str, Callable[..., None]] = {"": edit}


def main(args: Sequence[str]) -> None:
    """Parse and edit."""
    run(edit, args, "imagewright edit", EPILOG)
