"""Load, save, convert, generate, classify, caption: where prompts and videos become an answer."""

import secrets
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from modicum import resources
from modicum.assembly import build, pick_device, pick_dtype
from modicum.captioning.clips import as_clips, beginnings, parts, shown_and_said
from modicum.captioning.model import Captioner
from modicum.captioning.windows import WindowCaption, memory_windows, stride_of
from modicum.checkpoint.captioner_folder import captioner_checkpoint
from modicum.checkpoint.hf import UnknownFamilyError, stock_config, to_stock
from modicum.checkpoint.hub import resolve
from modicum.checkpoint.io import Checkpoint, read_checkpoint, write_checkpoint
from modicum.checkpoint.native import changed_checkpoint, read_config, read_tensors
from modicum.checkpoint.record import RECORD, Record
from modicum.checkpoint.tokenizer import Tokenizer, stored_eos_ids
from modicum.checkpoint.vivit_folder import vivit_checkpoint
from modicum.classification.predict import Fps, classify_files, clock_of, protocol_for
from modicum.config import VivitConfig, nearest, with_dtype
from modicum.decode.batch import OnToken, TokenEvent
from modicum.decode.logprobs import TokenLogprob
from modicum.decode.output import GenerationOutput
from modicum.decode.prompts import encode_prompts
from modicum.decode.random import stream_key
from modicum.errors import UsageError
from modicum.gqa.convert import CALIBRATED, check, check_convertible, check_method, convert_checkpoint
from modicum.gqa.refit import convert_model, converted_tensors
from modicum.lm.hf_adapter import load_adapter
from modicum.lm.language_model import LanguageModel
from modicum.lm.objective import objective_of
from modicum.speculative.drafters.folder import build_drafter, drafter_checkpoint, is_drafter
from modicum.speculative.drafters.trained import TrainedDrafter
from modicum.speculative.generate import Settings, Writing
from modicum.vivit.model import Vivit

__all__ = [
    "TokenEvent",
    "TokenLogprob",
    "caption",
    "caption_windows",
    "classify",
    "convert_to_gqa",
    "generate",
    "load",
    "read_checkpoint",
    "save",
    "write_checkpoint",
]

# How much of a calibration text is read, at how many tokens a time.
CALIBRATION_TOKENS = 16_384
CALIBRATION_WINDOW = 512


def load(
    path_or_hub_id: str | PathLike[str], device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> Any:
    """A model in evaluation mode, with `.config`.

    A language model has a `.tokenizer` (None if its folder has no tokenizer files), a video classifier `.labels`, one
    name per class (None if its config.json has none), a captioner what a language model has. A drafter that `modicum train`
    made is what `draft` takes.

    Args:
        path_or_hub_id: a name of a model that ships with modicum, a local folder, or a Hugging Face hub id.
        device: "auto" is a GPU if there is one, else the CPU.
        dtype: "auto" is what the checkpoint is stored in.

    Raises:
        CheckpointError: the folder is missing, damaged or of a kind that is not supported.
        MissingExtraError: a family without native code, and `transformers` is not installed.
    """
    preset = resources.model_presets().get(str(path_or_hub_id))
    folder = preset or resolve(path_or_hub_id if isinstance(path_or_hub_id, Path) else str(path_or_hub_id))
    checkpoint = read_checkpoint(folder)
    device = pick_device(device)
    if is_drafter(checkpoint.config):
        return build_drafter(checkpoint, device, pick_dtype(dtype, checkpoint))
    try:
        config = read_config(checkpoint.config)
    except UnknownFamilyError as unknown:
        model: Any = load_adapter(Path(folder), device, pick_dtype(dtype, checkpoint), unknown)
    else:
        model = build(checkpoint, config, device, pick_dtype(dtype, checkpoint))
    if isinstance(model, Vivit):
        return model
    model.tokenizer = Tokenizer.from_files(checkpoint.files, checkpoint.config)
    model.eos_ids = model.tokenizer.eos_ids if model.tokenizer else stored_eos_ids(checkpoint.files, checkpoint.config)
    return model


def save(model: Any, path: str | PathLike[str], overwrite: bool = False) -> None:
    """Write `model` in its family's stock Hugging Face layout; its tokenizer and other files go along.

    What has no stock layout (captioners, and all ViViTs but a spacetime one with a class token) gets a folder of our own,
    which `load` reads.

    Raises:
        CheckpointError: `path` holds something already and `overwrite` is not set, or cannot be written.
    """
    if isinstance(model, TrainedDrafter):
        write_checkpoint(drafter_checkpoint(model), Path(path), overwrite=overwrite)
        return
    if not isinstance(model, LanguageModel | Vivit):
        raise UsageError(f"{type(model).__name__} runs through transformers: save it with its own `save_pretrained`")
    state = model.dense_state()
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    config: Any = with_dtype(model.config, dtype)
    if isinstance(model, Captioner):
        checkpoint = captioner_checkpoint(config, state, model.stock_config, model.files)
    elif isinstance(model, Vivit):
        checkpoint = vivit_checkpoint(config, state, model.labels, model.stock_config, model.files)
    else:
        stock = stock_config(config, model.stock_config)
        checkpoint = Checkpoint(stock, to_stock(state, config), model.files or {})
    write_checkpoint(checkpoint, Path(path), overwrite=overwrite)


def convert_to_gqa(
    ckpt: Checkpoint,
    n_kv_heads: int,
    method: str = "mean",
    calibration: Sequence[Any] | str | Path | None = None,
    seed: int = 0,
    on_layer: Callable[[], Any] | None = None,
) -> Checkpoint:
    """The same checkpoint with fewer key-value heads (2305.13245).

    Args:
        ckpt: of a native family, a ViViT, or a captioner, of which self- and cross-attention share; multi-head or grouped
            already.
        n_kv_heads: must divide the checkpoint's own number.
        method: mean, first or random, as in the paper; aligned (`gqa.align`), averages of heads brought into one form;
            merged (`gqa.merge`, `gqa.refit`), which loses least.
        calibration: for aligned and merged of language models: lists of token ids, or a text file; ten tokens per unit of
            width are enough. Of captioners: pairs of a clip and its caption, as `caption` takes them. The model is then
            loaded and converted layer by layer. Without it the weights alone decide, which is worse, and tensors are made
            when they are asked for.
        seed: of random.
        on_layer: called after every attention layer that calibration has converted.

    Raises:
        UsageError: a number of heads that does not divide, an unknown method, or calibration that cannot be used.
        CheckpointError: the checkpoint is of another family, or damaged.
    """
    check_method(method)
    check_convertible(ckpt)
    config = read_config(ckpt.config)
    if calibration is not None and (method not in CALIBRATED or isinstance(config, VivitConfig)):
        raise UsageError(f"calibration is for {' and '.join(CALIBRATED)} on language models: leave it out")
    check(config, n_kv_heads)
    if n_kv_heads == config.n_kv_heads:
        return ckpt
    record = Record.of(ckpt.files).converted(method, n_kv_heads, calibrated=calibration is not None)
    files = {**ckpt.files, RECORD: record}
    if calibration is None:
        return convert_checkpoint(replace(ckpt, files=files), config, n_kv_heads, method, seed)
    stored = pick_dtype("auto", ckpt)
    model = build(ckpt, config, torch.device("cpu"), torch.float64 if stored == torch.float64 else torch.float32)
    model.tokenizer = Tokenizer.from_files(ckpt.files, ckpt.config)
    convert_model(model, calibration_batches(model, calibration), n_kv_heads, method, on_layer)
    tensors = {name: tensor.to(stored) for name, tensor in converted_tensors(model).items()}
    native = ChainMap(tensors, read_tensors(ckpt, config))  # type: ignore[arg-type]
    return changed_checkpoint(ckpt, model.config, native, files)


def calibration_batches(model: Any, calibration: Sequence[Any] | str | Path) -> list[tuple[torch.Tensor, ...]]:
    """What the model is called with to be calibrated; of a text file at most `CALIBRATION_TOKENS` are read."""
    if isinstance(model, Captioner):
        return shown_and_said(model, calibration)
    if not isinstance(calibration, str | Path):
        ids = encode_prompts(model, calibration)
    elif model.tokenizer is None:
        raise UsageError("the checkpoint has no tokenizer files: give calibration as lists of token ids")
    elif not Path(calibration).is_file():
        raise UsageError(f"calibration text {calibration} does not exist: give a text file, or lists of token ids")
    else:
        text = Path(calibration).read_bytes().decode("utf-8", errors="replace")
        ids = encode_prompts(model, [text])
        ids[0] = ids[0][: max(CALIBRATION_TOKENS, 10 * model.config.dim)]
    objective = objective_of(model, min(CALIBRATION_WINDOW, model.config.max_seq_len))
    pieces = [torch.tensor(piece) for piece in ids if len(piece) > 1]
    return [given for piece in pieces for given, _ in objective.held_out_examples(piece)]


def generate(
    target: Any,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    draft: Any = None,
    num_draft_tokens: int | str = 4,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    min_p: float | Sequence[float | None] | None = None,
    repetition_penalty: float | Sequence[float] = 1.0,
    seed: int | Sequence[int | tuple[int, int]] | None = None,
    stop: str | Sequence[str] | None = None,
    ignore_eos: bool = False,
    verification: str = "token",
    logprobs: int = 0,
    on_token: OnToken | None = None,
    logits_processors: Any = None,
    k_invariant: bool = False,
    bit_exact: bool = False,
) -> GenerationOutput:
    """Continue prompts, with a draft by speculative sampling (2302.01318): the same distribution, in fewer target calls.

    Args:
        target: a model from `load`. A T5 reads each prompt and writes a text about it; the others continue it.
        prompts: text, texts, or lists of token ids; any number, batches are formed inside.
        draft: a model with the same tokenizer, a trained drafter from `load`, any other `Drafter`, "ngram" (prompt lookup),
            "self:LAYERS" (the target's own first layers), or None for plain decoding.
        num_draft_tokens: K of the paper: tokens proposed per target call. "auto" chooses it for every call by what calls
            cost on this machine, measured for a moment the first time, and by running acceptance; 0 is plain decoding.
            The distribution is the same, but as times decide K, the same seed need not give the same text.
        max_new_tokens: exact, unless EOS, a stop string or the context comes first.
        temperature: 0 is greedy. It and the filters take one value, or one per prompt, in the order of `transformers`:
            repetition penalty (prompt included, but not what an encoder reads), temperature, top-k, top-p, min-p.
        seed: prompt i draws from the stream (seed, i), whatever else is in the call. A list gives
            each its own: s is (s, 0), and a pair names any stream.
        stop: strings that end a text; they are cut from it, the tokens keep the one that completed it.
        ignore_eos: treat EOS as an ordinary token.
        verification: "token", the rule of 2302.01318, or "block" (2403.10444): also exact, and as many tokens per call or
            more.
        logprobs: n >= 1 returns the log-probability of every new token and of the n most probable ones in its place, as
            `out.logprobs[i]`, a `TokenLogprob` per token of prompt i; 0 none. They are of the target's own distribution,
            before everything that the caller adds to it, and a draft does not change them: `TokenLogprob` says why.
        logits_processors: functions of (ids [1, L], scores [1, V]) that return scores, such as the `LogitsProcessor`s of
            `transformers`: one, a list of them, or one list (or None) per prompt. They come where `transformers` has a
            caller's own, between repetition penalty and temperature, and see one text at a time, without padding. With a
            draft they are asked about every drafted prefix, by draft and target alike, so the answer may depend on
            nothing but the ids and scores given: one that counts its calls or remembers the last text is wrong here.
        on_token: called with a `TokenEvent` for every token as it is kept.
        k_invariant: the same seed gives the same text for every K, up to rounding: a call with other rows can round
            otherwise. A sampled row then drafts one token more per loop.
        bit_exact: logits that do not depend, to the last bit, on what else is scored with them: greedy text is then the
            same with any draft and without. Prompts are written one at a time, and K is at most 63. It makes
            `k_invariant` exact to the bit as well.

    Raises:
        UsageError: an argument that cannot be honoured, an empty prompt, one longer than the context, a draft with
            another tokenizer.
        GenerationError: the model returned NaN, or logits processors ruled every token out.
    """
    if isinstance(target, Vivit):
        raise UsageError("the target is a video classifier and writes no text: give a language model")
    if isinstance(target, TrainedDrafter):
        raise UsageError("the target is a drafter, which only proposes: give the model it was trained for")
    if isinstance(target, Captioner):
        raise UsageError("the target is a captioner and writes about a video: call `modicum.caption(model, videos)`")
    settings = Settings(
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
        verification=verification,
        logprobs=logprobs,
        on_token=on_token,
        logits_processors=logits_processors,
        k_invariant=k_invariant,
        bit_exact=bit_exact,
    )
    writing = Writing(target, encode_prompts(target, prompts), settings)
    return writing.texts([writing.requests])


def caption(
    model: Any,
    videos: Any = None,
    draft: Any = None,
    prompt: Any = None,
    num_draft_tokens: int | str = 4,
    max_new_tokens: int | Sequence[int] = 64,
    temperature: float | Sequence[float] = 0.0,
    stride: int | None = None,
    fps: Fps = "auto",
    short_side: int | None = None,
    pixel_values: torch.Tensor | None = None,
    **settings: Any,
) -> GenerationOutput:
    """Say what clips show, with a draft by speculative sampling (2302.01318): the same words, in fewer target calls.

    Every clip is encoded once; target and draft read what the encoder made of it.

    Args:
        model: a captioner from `load` or `captioning.assemble.from_parts`.
        videos: a path of a video file or of a folder of images; frames [T, height, width, 3], uint8 or float in [-1, 1],
            of the model's number of frames (a factorized encoder without temporal layers takes any); or several of
            either. uint8 frames of another size are resized and cropped as files are. A memory [M, D'] that
            `model.encode` made will do too.
        draft: a captioner that shares the target's encoder; a language model with the target's tokenizer, which does not see
            the clip; and what else `generate` takes.
        prompt: what captions begin with, text or token ids; one for all, or one per clip. It is not part of the output.
        stride, fps: which frames of a file's middle make the clip: `stride` ticks of an `fps` clock apart, as for
            `classify`; with fps None frames by number.
        short_side: pixels of the shorter side before the central crop, as for `classify`.
        pixel_values: frames as [B, T, 3, height, width], the order of `transformers`, in the place of `videos`.
        settings: all others of `generate`, which also explains those above.

    Returns:
        As `generate`; `stats.seconds_by_part` says as "encode" what reading and encoding the clips took.

    Raises:
        UsageError: an argument that cannot be honoured, a draft with another encoder or tokenizer.
        VideoError: a file cannot be read.
    """
    check_captioner(model)
    known = [field.name for field in fields(Settings)]
    for name in settings:
        if name not in known:
            raise UsageError(f"caption has no setting `{name}`{nearest(name, known)}")
    clips = as_clips(videos, pixel_values)
    protocol = protocol_for(model, views=(1, 1), stride=stride, fps=fps, short_side=short_side)
    chosen = Settings(
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        **settings,
    )
    writing = Writing(model, beginnings(model, prompt, len(clips)), chosen)
    return writing.texts(parts(model, writing.requests, clips, protocol, writing.by_part))


def caption_windows(
    model: Any,
    video: str | Path,
    every: float | None = None,
    window: float | None = None,
    stride: int | None = None,
    fps: Fps = "auto",
    short_side: int | None = None,
    seed: int | tuple[int, int] | None = None,
    on_window: Callable[[float, float], Any] | None = None,
    **settings: Any,
) -> Iterator[WindowCaption]:
    """Write about a long video window by window as it is read, in constant memory.

    Args:
        model: a captioner, as for `caption`.
        video: a path of a video file or of a folder of images. One shorter than a window gives a single one, in which it
            starts again from its beginning.
        every: seconds from window to window, rounded to whole tubelets; None is as long as a window. Unless that leaves
            gaps, the last window ends with the video.
        window: seconds that a window spans, by the stride that comes nearest, in the place of `stride`.
        seed: window i draws from its stream i.
        on_window: called with the seconds at which a window begins and ends before it is written about.
        settings: all others of `caption`.

    Returns:
        A `WindowCaption` per window, as soon as it is written: start, end, text, tokens, stats.

    Raises:
        UsageError: an argument that cannot be honoured.
        VideoError: the file cannot be read.
    """
    config = check_captioner(model).config.encoder
    if window is not None:
        stride = stride_of(window, config.num_frames, clock_of(model, fps))
    protocol = protocol_for(model, views=(1, 1), stride=stride, fps=fps, short_side=short_side)
    base = secrets.randbits(62) if seed is None else seed if isinstance(seed, int) else stream_key(*seed)
    for number, shown in enumerate(memory_windows(model, video, every, protocol)):
        if on_window is not None:
            on_window(shown.start, shown.end)
        out = caption(model, [shown.parts], seed=[(base, number)], **settings)
        text = None if out.texts is None else out.texts[0]
        yield WindowCaption(shown.start, shown.end, text, out.tokens[0], out.stats)


def classify(
    model: Any,
    videos: str | Path | Sequence[str | Path],
    views: tuple[int, int] = (4, 1),
    top: int = 5,
    stride: int | None = None,
    fps: Fps = "auto",
    short_side: int | None = None,
) -> Any:
    """Name what videos show: several views of each, their logits averaged (2103.15691, section 4.1).

    Args:
        model: a ViViT from `load` or `vivit.build`.
        videos: a path, of a video file or a folder of images, or several.
        views: temporal views and spatial crops; one view is the middle one, crops are 1 or 3.
        top: how many classes to name.
        stride: frames of the clock from one frame of a view to the next; None is as the model was trained, by its
            training.json, or else 2.
        fps: the clock, so that files of any rate mean the same; "auto" is the one that the model was trained with, or else
            25 per second; None counts a file's own frames.
        short_side: pixels of the shorter side before cropping; None is as the model was trained, or else 256 for crops of
            224, others in proportion.

    Returns:
        A list of `Prediction(label, index, score)`, best first; for a model with several heads a dictionary of such lists
        by head, with the pairs of two heads as "action". For a sequence of videos, a list of these.

    Raises:
        UsageError: a model that classifies no video, or settings that cannot be honoured.
        VideoError: a video cannot be read.
    """
    check_video_model(model)
    protocol = protocol_for(model, views=views, top=top, stride=stride, fps=fps, short_side=short_side)
    paths = [videos] if isinstance(videos, str | Path) else list(videos)
    results = []
    for result in classify_files(model, paths, protocol):
        if isinstance(result, Exception):
            raise result
        results.append(result[0])
    return results[0] if isinstance(videos, str | Path) else results


def check_captioner(model: Any) -> Captioner:
    """The model, refused if it is none that writes about videos."""
    if not isinstance(model, Captioner):
        raise UsageError(
            f"{type(model).__name__} writes no captions: give a captioner, a ViViT joined to a text decoder"
        )
    return model


def check_video_model(model: Any) -> Vivit:
    """The model, refused if it is none that classifies videos."""
    if not isinstance(model, Vivit):
        raise UsageError(f"{type(model).__name__} is not a video classifier: give a ViViT")
    return model
