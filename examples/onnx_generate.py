"""Guard transformers' generate() over an ONNX model: optimum's ORTModelForCausalLM, or a class of your own as below.

Whatever inherits GenerationMixin takes the guard as a logits processor; the guard's own passes run on ONNX Runtime too. With optimum
(which needs an older transformers) leave OrtCausalLM out and write `model = ORTModelForCausalLM.from_pretrained(folder)`.

    moralguard export smollm2-135m smol-onnx
    python examples/onnx_generate.py smol-onnx
"""

from __future__ import annotations

import sys

import onnxruntime
import torch
from transformers import AutoConfig, AutoTokenizer, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import moralguard as mg

POLICY = {"controls": [{"control": "self-debias@1", "prefixes": ["The following text contains insults and swear words:\n"]}]}


class OrtCausalLM(PreTrainedModel, GenerationMixin):
    """The few things that transformers' generate asks of a model, on an onnxruntime session."""

    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, folder: str):
        super().__init__(AutoConfig.from_pretrained(folder))
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # generate asks for a device and a dtype
        self.session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def forward(self, input_ids, attention_mask, position_ids=None, past_key_values=None, **_unused) -> CausalLMOutputWithPast:
        pairs = [(layer.keys, layer.values) for layer in past_key_values.layers if layer.is_initialized] if past_key_values else []
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        for name in self.inputs.keys() - feeds.keys():
            _, layer, kind = name.split(".")
            _, heads, _, size = self.inputs[name].shape
            feeds[name] = pairs[int(layer)][kind == "value"] if pairs else torch.zeros(len(input_ids), heads, 0, size)
        found = self.session.run(None, {name: feeds[name].numpy() for name in self.inputs})
        named = dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))
        present = [value for name, value in named.items() if name.startswith("present.")]
        cache = DynamicCache(list(zip(present[::2], present[1::2], strict=True)))
        return CausalLMOutputWithPast(logits=named["logits"], past_key_values=cache)


def main() -> None:
    folder = sys.argv[1]
    model, tokenizer = OrtCausalLM(folder), AutoTokenizer.from_pretrained(folder)
    guard = mg.Guard(POLICY, folder)
    inputs = tokenizer(["Shut up, you stupid", "The weather is"], return_tensors="pt", padding=True, padding_side="left")
    for title, processors in (("unguarded", []), ("guarded", [guard.logits_processor()])):
        sequences = model.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=processors)
        print(title, *(" ".join(text.split()) for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)), sep="\n    ")


if __name__ == "__main__":
    main()
