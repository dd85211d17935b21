"""One system of text_peers.py in a process of its own. Started by it, under the Python in which the system is installed.

Reads a number of tokens per line, generates as many greedily from the same prompt, and answers with a line of JSON:
seconds and tokens. Imports nothing of modicum unless modicum is what is measured.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

Generate = Callable[[int], list[int]]

# How many tokens prompt lookup matches at most: what modicum's own uses.
LONGEST_NGRAM = 4


def modicum_system(spec: dict[str, Any]) -> Generate:
    import torch

    import modicum

    torch.set_num_threads(spec["threads"])
    target = modicum.load(spec["target"], device="cpu", dtype=spec["precision"])
    draft: Any = {"plain": None, "lookup": "ngram", "draft": None}[spec["mode"]]
    if spec["mode"] == "draft":
        draft = modicum.load(spec["draft"], device="cpu", dtype=spec["precision"])

    def generate(n_tokens: int) -> list[int]:
        settings = {"max_new_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        return modicum.generate(target, [spec["prompt"]], draft, spec["k"], **settings).tokens[0]

    return generate


def openvino_system(spec: dict[str, Any]) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai

    hint = {"float32": "f32", "bfloat16": "bf16", "int8": "bf16"}[spec["precision"]]
    device = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": spec["threads"]}
    # By default the pipeline remembers a prompt that it has read, and would not read it again in the next round.
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    extra: dict[str, Any] = {"scheduler_config": scheduler}
    if spec["mode"] == "draft":
        extra["draft_model"] = openvino_genai.draft_model(openvino_folder(spec, "draft"), "CPU", **device)
    elif spec["mode"] == "lookup":
        extra["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(openvino_folder(spec, "target"), "CPU", **extra, **device)
    settings = openvino_genai.GenerationConfig()
    settings.do_sample, settings.ignore_eos = False, True
    settings.set_eos_token_id(0)  # it refuses a model that names none
    if spec["mode"] != "plain":
        settings.num_assistant_tokens = spec["k"]
    if spec["mode"] == "lookup":
        settings.max_ngram_size = LONGEST_NGRAM
    ids_1L = np.array([spec["prompt"]])
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids_1L), openvino.Tensor(np.ones_like(ids_1L)))

    def generate(n_tokens: int) -> list[int]:
        settings.max_new_tokens = n_tokens
        return list(pipeline.generate(inputs, settings).tokens[0])

    return generate


def openvino_folder(spec: dict[str, Any], role: str) -> str:
    """The model as OpenVINO reads it, in the precision in which it is stored or with weights of 8 bits."""
    import openvino

    source, stored = Path(spec[role]), Path(spec["work"]) / f"{role}-openvino"
    if not stored.exists():
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=False)
        model.save_pretrained(stored)
        # Token ids go in and come out, and yet speculative pipelines compare the tokenizers of both models.
        if (source / "tokenizer.json").exists():
            from openvino_tokenizers import convert_tokenizer
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
            for name, part in zip(("", "de"), convert_tokenizer(tokenizer, with_detokenizer=True), strict=True):
                openvino.save_model(part, stored / f"openvino_{name}tokenizer.xml")
    if spec["precision"] != "int8":
        return str(stored)
    compressed = stored.with_name(f"{role}-openvino-int8")
    if not compressed.exists():
        import shutil

        import nncf

        model = nncf.compress_weights(openvino.Core().read_model(stored / "openvino_model.xml"))
        shutil.copytree(stored, compressed, ignore=shutil.ignore_patterns("openvino_model.*"))
        openvino.save_model(model, compressed / "openvino_model.xml")
    return str(compressed)


def llama_system(spec: dict[str, Any]) -> Generate:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    lookup = LlamaPromptLookupDecoding(max_ngram_size=LONGEST_NGRAM, num_pred_tokens=spec["k"])
    model = Llama(
        str(gguf_file(spec)),
        n_ctx=len(spec["prompt"]) + spec["max_tokens"] + spec["k"] + 1,
        n_threads=spec["threads"],
        n_threads_batch=spec["threads"],
        draft_model=lookup if spec["mode"] == "lookup" else None,
        verbose=False,
    )

    def generate(n_tokens: int) -> list[int]:
        model.reset()  # otherwise a prompt that it has read before is not read again
        return list(islice(model.generate(list(spec["prompt"]), temp=0.0), n_tokens))

    return generate


def gguf_file(spec: dict[str, Any]) -> Path:
    """The target as llama.cpp reads it, without a vocabulary: vectors in float32, matrices in the precision asked for."""
    import gguf
    from safetensors.torch import load_file

    source, path = Path(spec["target"]), Path(spec["work"]) / f"target-{spec['precision']}.gguf"
    if path.exists():
        return path
    config = json.loads((source / "config.json").read_text())
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    kinds = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0"}
    kind = gguf.GGMLQuantizationType[kinds[spec["precision"]]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for stored_name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        if "q_proj" in stored_name or "k_proj" in stored_name:
            # Rotary pairs are neighbours there, and half a head apart in the stored layout.
            heads = n_heads if "q_proj" in stored_name else n_kv_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        its_kind = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        name = names.get_name(stored_name, try_suffixes=(".weight",))
        writer.add_tensor(name, gguf.quants.quantize(values, its_kind), raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SYSTEMS = {"modicum": modicum_system, "OpenVINO GenAI": openvino_system, "llama.cpp": llama_system}


def main() -> None:
    # Libraries print on standard output, and nothing of that may be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    try:
        generate = SYSTEMS[spec["engine"]](spec)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": error.name}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        began = time.perf_counter()
        tokens = generate(int(line))
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": [int(token) for token in tokens]}), file=answers)


if __name__ == "__main__":
    main()
