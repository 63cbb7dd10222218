"""Every way in which transformers generates, under the guard: the law of a row is what it is for that row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from odd_models import ANYWHERE, CONTROLS, PROMPTS, basis, cohere, gemma2, granite, left_padded, mistral
from tiny_models import FAMILIES, VOCAB, llama
from transformers import GenerationConfig, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import moralguard as mg
from moralguard.controls import DExperts, Fudge, NullspaceProjection, Prompt
from moralguard.decoding.gate import Gate
from moralguard.decoding.grad import plain_no_grad
from moralguard.decoding.session import Session

NEW = 4
CLOSE = 1e-5
ROUTES = [(name, route) for name in CONTROLS for route in ("processor", "attach") if route == "attach" or name in ANYWHERE]
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "returns": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams_returns": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
}


class Recorder(LogitsProcessor):
    """The ids of every step."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids.append(input_ids.clone())
        return scores


def guard_of(model: Any, *controls: Any, **policy: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=list(controls), **policy), (model, None))


def generate(guard: mg.Guard, route: str, inputs: dict[str, torch.Tensor], before: Sequence[Any] = (), **settings: Any) -> Any:
    """``model.generate`` under the guard, with every score in the output."""
    model = guard.lm.model
    arguments = {"max_new_tokens": NEW, "top_k": 0, "return_dict_in_generate": True, "output_scores": True} | settings
    torch.manual_seed(5)
    if route == "processor":
        return model.generate(**inputs, logits_processor=[*before, guard.logits_processor()], **arguments)
    with guard.attach(model):
        return model.generate(**inputs, logits_processor=list(before), **arguments)


def laws_alone(guard: mg.Guard, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Probabilities f32[n + 1, V] before and after these tokens, this request running alone and unpadded, its tokens given."""
    laws = []
    with plain_no_grad():
        session = Session(guard.lm, guard.controls, [list(prompt)], own_base=True, gate=guard.gate)
        for i in range(len(tokens) + 1):
            laws.append(torch.softmax(session.step(temperature=temperature).logits[0] / temperature, -1))
            if i < len(tokens):
                session.commit(torch.tensor([tokens[i]]))
                session.advance()
    return torch.stack(laws)


@torch.no_grad()
def base_laws(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """The unguarded probabilities at the same places, from one forward pass."""
    return torch.softmax(model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 :].float(), -1)


def on_the_edge(guard: mg.Guard, base_law: torch.Tensor) -> bool:
    """Whether rounding alone decides if a token is inside a control's nucleus."""
    mass = base_law.sort(descending=True).values.double()
    before = mass.cumsum(0) - mass
    nuclei = [control.settings.filter_p for control in guard.controls if isinstance(control.settings, DExperts)]
    return any(float((before - p).abs().min()) < 2e-6 for p in nuclei)


def check_steps(guard: mg.Guard, prompts: Sequence[Sequence[int]], ids: Sequence[torch.Tensor], scores: Sequence[torch.Tensor]) -> None:
    """The laws of all steps and rows against those of each history alone; at least one must differ from the base's."""
    known: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
    acted, compared, on_edge = 0.0, 0, 0
    for step in reversed(range(len(ids))):  # the longest first: it covers its own prefixes
        rows_a_prompt = len(ids[step]) // len(prompts)
        for row, history in enumerate(ids[step].tolist()):
            prompt = prompts[row // rows_a_prompt]
            tokens = history[len(history) - step :]
            assert history[-step - len(prompt) :] == [*prompt, *tokens], "a row's history isn't its prompt's"
            if (row // rows_a_prompt, *tokens) not in known:
                laws = zip(laws_alone(guard, prompt, tokens), base_laws(guard.lm.model, prompt, tokens), strict=True)
                known |= {(row // rows_a_prompt, *tokens[:i]): pair for i, pair in enumerate(laws)}
            expected, base = known[(row // rows_a_prompt, *tokens)]
            if on_the_edge(guard, base):
                on_edge += 1
                continue
            acted = max(acted, float((expected - base).abs().max()))
            compared += 1
            difference = float((torch.softmax(scores[step][row], -1) - expected).abs().max())
            assert difference < CLOSE, f"step {step}, row {row}: {difference}"
    assert compared > 2 * on_edge
    assert acted > 1e-3, "the control does nothing here, so this test would pass without the guard"


THREE = PROMPTS[:3]
OTHER_FAMILIES = [
    (family, name, "attach", mode) for family in FAMILIES if family != "llama" for name in CONTROLS for mode in ("greedy", "beams")
]


@pytest.mark.parametrize(
    ("family", "name", "route", "mode"), [("llama", name, route, mode) for name, route in ROUTES for mode in MODES] + OTHER_FAMILIES
)
def test_law_is_that_of_the_row_alone(family: str, name: str, route: str, mode: str) -> None:
    guard = guard_of(FAMILIES[family](), CONTROLS[name]())
    recorder = Recorder()
    out = generate(guard, route, left_padded(THREE), [recorder], **MODES[mode])
    check_steps(guard, THREE, recorder.ids, out.scores)
    assert out.sequences.shape == (len(THREE) * MODES[mode].get("num_return_sequences", 1), len(THREE[0]) + NEW)


PAIRS = [(one, other) for i, one in enumerate(CONTROLS) for other in list(CONTROLS)[i + 1 :]]


@pytest.mark.parametrize(
    ("names", "mode"),
    [(names, "greedy") for names in PAIRS] + [(names, "beams") for names in (("self_debias", "nullspace"), tuple(CONTROLS))],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_controls_together_under_attach(names: tuple[str, ...], mode: str) -> None:
    """Passes of one control don't reach what another one reads of the base."""
    guard, recorder = guard_of(llama(), *(CONTROLS[name]() for name in names)), Recorder()
    out = generate(guard, "attach", left_padded(PROMPTS), [recorder], **MODES[mode])
    check_steps(guard, PROMPTS, recorder.ids, out.scores)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_tokens_are_those_of_the_row_alone(name: str, route: str, mode: str) -> None:
    guard = guard_of(llama(), CONTROLS[name]())
    together = generate(guard, route, left_padded(PROMPTS), **MODES[mode], max_new_tokens=6).sequences[:, -6:]
    alone = [generate(guard, route, left_padded([prompt]), **MODES[mode], max_new_tokens=6).sequences[0, -6:] for prompt in PROMPTS]
    assert together.tolist() == torch.stack(alone).tolist()
    base = guard.lm.model.generate(**left_padded(PROMPTS), max_new_tokens=6, top_k=0, **MODES[mode])
    assert together.tolist() != base[:, -6:].tolist()


def test_beam_rows_are_normalised_log_probabilities() -> None:
    guard = guard_of(llama(), CONTROLS["dexperts"]())
    out = generate(guard, "processor", left_padded(PROMPTS), **MODES["beams"])
    for scores in out.scores:
        assert torch.allclose(scores.exp().sum(-1), torch.ones(scores.shape[0]), atol=1e-5)


# --- Assisted decoding ----------------------------------------------------------------------------------------------------------


def next_of_five(token_ids: torch.Tensor, candidates: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Counts 0 1 2 3 4 0 1 ...: text that prompt lookup drafts well."""
    return torch.where(candidates == ((token_ids[:, -1:] + 1) % 5), 40.0, -40.0)


COUNTING = Fudge(discriminator=next_of_five, strength=1.0, top_k=VOCAB)


class Forwards:
    """Counts the forward passes of a model's base (not those of the guard's passes, which run without a batch of one row)."""

    def __init__(self, model: Any) -> None:
        self.widths: list[int] = []
        model.register_forward_hook(lambda _m, _a, kw, _o: self.widths.append(kw["input_ids"].shape[1]), with_kwargs=True)


@pytest.mark.parametrize("route", ["processor", "attach"])
def test_prompt_lookup_accepts_and_rejects_drafts(route: str) -> None:
    model, prompt = llama(), [3, 17, 0, 1, 3, 17]  # the first draft (0, 1, 3, 17) is rejected; later ones count on
    guard = guard_of(model, COUNTING)
    plain = generate(guard, route, left_padded([prompt]), max_new_tokens=16)
    forwards = Forwards(model)
    drafted = generate(guard, route, left_padded([prompt]), max_new_tokens=16, prompt_lookup_num_tokens=4)
    assert plain.sequences[0, -15:].tolist() == [i % 5 for i in range(plain.sequences[0, -15], plain.sequences[0, -15] + 15)]
    assert torch.equal(drafted.sequences, plain.sequences)
    assert len(forwards.widths) < 12, "no draft was accepted"
    check_steps(guard, [prompt], [drafted.sequences[:, : len(prompt) + i] for i in range(16)], drafted.scores)


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("drafts", ["lookup", "assistant", "own_weights"])
@pytest.mark.parametrize("route", ["processor", "attach"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_assisted_decoding_has_the_guarded_law(name: str, route: str, drafts: str, sample: bool) -> None:
    model, prompt = llama(), [3, 17, 5, 3, 17, 5, 3, 17]
    helper = {"lookup": None, "assistant": llama(seed=9, layers=1), "own_weights": llama()}[drafts]
    how = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2} if helper is None else {"assistant_model": helper}
    guard = guard_of(model, CONTROLS[name]())
    out = generate(guard, route, left_padded([prompt]), do_sample=sample, max_new_tokens=10, **how)
    check_steps(guard, [prompt], [out.sequences[:, : len(prompt) + i] for i in range(10)], out.scores)
    if not sample:
        assert torch.equal(out.sequences, generate(guard, route, left_padded([prompt]), max_new_tokens=10).sequences)
    assert guard.counters.unguarded_tokens == 0


# --- Streaming, caches, inference mode, compilation -----------------------------------------------------------------------------


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_streamer_gets_the_guarded_tokens(name: str, route: str) -> None:
    guard, streamer = guard_of(llama(), CONTROLS[name]()), Collector()
    out = generate(guard, route, left_padded(PROMPTS[:1]), streamer=streamer)
    assert streamer.ids == [*out.sequences[0].tolist(), -1]
    assert torch.equal(out.sequences, generate(guard, route, left_padded(PROMPTS[:1])).sequences)


@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_cache_of_the_model_does_not_matter(name: str, route: str, settings: dict[str, Any]) -> None:
    guard, recorder = guard_of(llama(), CONTROLS[name]()), Recorder()
    out = generate(guard, route, left_padded(PROMPTS), [recorder], **settings)
    check_steps(guard, PROMPTS, recorder.ids, out.scores)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_sliding_window(name: str, route: str, mode: str) -> None:
    guard, recorder = guard_of(mistral(), CONTROLS[name]()), Recorder()
    prompts = [*PROMPTS, list(range(40, 52))]
    out = generate(guard, route, left_padded(prompts), [recorder], max_new_tokens=8, **MODES[mode])
    check_steps(guard, prompts, recorder.ids, out.scores)


@torch.no_grad()
@pytest.mark.parametrize("route", ["processor", "attach", "loop"])
def test_sliding_window_of_a_prompted_expert_by_hand(route: str) -> None:
    """The pass with the prefix has a window of its own: it is the whole text read afresh, without a cache."""
    model, prefix, alpha = mistral(), [9, 8, 7], 1.5
    guard = guard_of(model, DExperts(expert=Prompt(prefix), alpha=alpha, filter_p=1.0))
    prompt = list(range(40, 51))
    if route == "loop":
        tokens = guard.generate([prompt], max_new_tokens=8).token_ids[0]
    else:
        out = generate(guard, route, left_padded([prompt, [1, 2]]), max_new_tokens=8)
        tokens = out.sequences[0, -8:].tolist()
    for i in range(8):
        text = [*prompt, *tokens[:i]]
        z, expert_z = (model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in (text, prefix + text))
        by_hand = torch.softmax(z + alpha * (expert_z - z), -1)
        assert int(by_hand.argmax()) == tokens[i]
        if route != "loop":
            assert float((torch.softmax(out.scores[i][0], -1) - by_hand).abs().max()) < CLOSE
    windowless = llama(seed=0)  # so that the window above is one that matters
    windowless.load_state_dict(model.state_dict())
    assert not torch.allclose(windowless(input_ids=torch.tensor([text])).logits[0, -1], z, atol=1e-3)


def last_state(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The input of the head, f32[d], read from the model's own outputs."""
    return model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[-1][0, -1]


HEADS = {
    "softcap": (gemma2, lambda x: 3.0 * torch.tanh(x / 3.0)),
    "scaled_down": (granite, lambda x: x / 0.6),
    "scaled_up": (cohere, lambda x: x * 1.5),
    "plain": (llama, lambda x: x),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["inlp", "leace"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "loop"])
@pytest.mark.parametrize("head", HEADS)
def test_projection_goes_through_the_head(head: str, mode: str, kind: str) -> None:
    """z' is the whole head applied to the projected state h', by hand."""
    build, bend = HEADS[head]
    model, u, keep = build(), basis(), 0.1
    weight = model.get_output_embeddings().weight
    mu = torch.linspace(-0.5, 0.5, u.shape[0]) if kind == "leace" else torch.zeros(u.shape[0])
    u_out = basis(seed=6) if kind == "leace" else u
    guard = guard_of(model, NullspaceProjection(basis=u if kind == "inlp" else (u, u_out, mu), keep=keep))
    if mode == "loop":
        done = guard.generate([list(p) for p in PROMPTS], max_new_tokens=NEW, trace=True)
        histories = [[p + t[:i] for p, t in zip(done.prompt_ids, done.token_ids, strict=True)] for i in range(NEW)]
    else:
        recorder = Recorder()
        out = generate(guard, "attach", left_padded(PROMPTS), [recorder], **MODES[mode])
        ratio = len(recorder.ids[0]) // len(PROMPTS)
        histories = [[ids[row, len(PROMPTS[0]) - len(PROMPTS[row // ratio]) :].tolist() for row in range(len(ids))] for ids in recorder.ids]
    for step, rows in enumerate(histories):
        for row, history in enumerate(rows):
            h = last_state(model, history)
            projected = h - (1 - keep) * u_out @ (u.T @ (h - mu))
            by_hand, unguarded = torch.softmax(bend(weight @ projected), -1), torch.softmax(bend(weight @ h), -1)
            assert float((by_hand - unguarded).abs().max()) > 1e-4
            if mode == "loop":
                assert int(by_hand.argmax()) == done.token_ids[row][step]
                assert done.traces[row][step].kl == pytest.approx(float((by_hand * (by_hand / unguarded).log()).sum()), abs=1e-4)
            else:
                assert float((torch.softmax(out.scores[step][row], -1) - by_hand).abs().max()) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [3.0, 30.0])
def test_soft_cap_is_seen_where_it_hardly_bends(cap: float, dtype: torch.dtype) -> None:
    """A cap far above the two probe tokens' logits is still the cap: other texts reach it."""
    model = gemma2(softcap=cap).to(dtype)
    head = mg.load_model((model, None)).head
    assert head is not None
    assert (head.softcap, head.scale) == (cap, 1.0)
    assert mg.load_model((llama().to(dtype), None)).head.softcap is None


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_inference_mode_of_the_caller(name: str, route: str, mode: str) -> None:
    guard = guard_of(llama(), CONTROLS[name]())
    outside = generate(guard, route, left_padded(PROMPTS), **MODES[mode])
    with torch.inference_mode():
        inside = generate(guard, route, left_padded(PROMPTS), **MODES[mode])
        own = guard.generate([list(p) for p in PROMPTS], max_new_tokens=NEW).token_ids
    assert torch.equal(inside.sequences, outside.sequences)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(inside.scores, outside.scores, strict=True))
    assert own == guard.generate([list(p) for p in PROMPTS], max_new_tokens=NEW).token_ids
    assert torch.is_grad_enabled()


def test_compiled_forward() -> None:
    inputs = left_padded(PROMPTS)
    eager = guard_of(llama(layers=1), CONTROLS["dexperts"]())
    expected = generate(eager, "processor", inputs)
    model = llama(layers=1)
    calls = []

    def backend(graph: Any, _example: Any) -> Any:
        calls.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    try:
        out = generate(guard_of(model, CONTROLS["dexperts"]()), "processor", inputs)
    finally:
        del model.forward
        torch._dynamo.reset()
    assert calls, "nothing was compiled"
    assert torch.equal(out.sequences, expected.sequences)
    assert all(torch.allclose(a.exp(), b.exp(), atol=CLOSE) for a, b in zip(out.scores, expected.scores, strict=True))


def test_compiled_model_object() -> None:
    """What torch.compile(model) returns is guarded like the model in it."""
    model = llama()
    compiled = torch.compile(model, backend="eager")
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["nullspace"]()]), (compiled, None))
    with guard.attach(compiled):
        found = compiled.generate(**left_padded(PROMPTS), max_new_tokens=NEW)
    assert torch.equal(found, generate(guard_of(llama(), CONTROLS["nullspace"]()), "attach", left_padded(PROMPTS)).sequences)


# --- Settings of the caller -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["keyword", "config", "model_default", "model_default_and_other_config"])
def test_pplm_fuses_at_the_temperature_in_force(where: str) -> None:
    """PPLM's geometric mean is of the laws at the temperature, wherever transformers takes that from."""
    model, temperature = llama(), 0.6
    guard = guard_of(model, CONTROLS["pplm"]())
    settings: dict[str, Any] = {"do_sample": True}
    if where == "keyword":
        settings["temperature"] = temperature
    elif where == "config":
        settings = {"generation_config": GenerationConfig(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=NEW)}
    else:
        model.generation_config.do_sample = True
        model.generation_config.temperature = temperature
    if where == "model_default_and_other_config":
        settings = {"generation_config": GenerationConfig(top_k=0, max_new_tokens=NEW)}
    out = generate(guard, "attach", left_padded(PROMPTS), **settings)
    for row, prompt in enumerate(PROMPTS):
        tokens = out.sequences[row, -NEW:-1].tolist()
        expected = laws_alone(guard, prompt, tokens, temperature)
        found = torch.stack([torch.softmax(scores[row], -1) for scores in out.scores])
        assert float((found - expected).abs().max()) < CLOSE
    at_one = torch.stack([law ** (1 / temperature) for law in laws_alone(guard, PROMPTS[0], [])])
    assert float((at_one / at_one.sum(-1, keepdim=True) - laws_alone(guard, PROMPTS[0], [], temperature)).abs().max()) > 1e-3


@pytest.mark.parametrize("ban", ["bad_words_ids", "suppress_tokens", "prefix_allowed_tokens_fn"])
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_bans_are_never_lifted(name: str, route: str, mode: str, ban: str) -> None:
    guard = guard_of(llama(), CONTROLS[name]())
    wanted = generate(guard, route, left_padded(PROMPTS), **MODES[mode]).sequences[:, -NEW:].unique().tolist()
    value = {
        "bad_words_ids": [[token] for token in wanted],
        "suppress_tokens": wanted,
        "prefix_allowed_tokens_fn": lambda _batch, _ids: [i for i in range(VOCAB) if i not in wanted],
    }[ban]
    out = generate(guard, route, left_padded(PROMPTS), **MODES[mode], **{ban: value})
    assert all(bool(torch.isneginf(scores[:, wanted]).all()) for scores in out.scores)
    assert not set(out.sequences[:, -NEW:].flatten().tolist()) & set(wanted)


@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_a_forced_token_is_kept(name: str, route: str) -> None:
    """min_new_tokens bans the end of text, forced_eos_token_id everything else at the end."""
    model = llama()
    model.generation_config.eos_token_id = 33
    guard = guard_of(model, CONTROLS[name]())
    out = generate(guard, route, left_padded(PROMPTS), min_new_tokens=NEW, forced_eos_token_id=33)
    assert out.sequences[:, -1].tolist() == [33] * len(PROMPTS)
    assert 33 not in out.sequences[:, -NEW:-1]


PAD = 17
AMBIGUOUS = {
    "pad_leads_the_text": [[PAD, 5, 9], [5, 9]],
    "pad_is_the_text": [[PAD, PAD, PAD], [PAD]],
    "same_ids_other_padding": [[PAD, 5], [5], [PAD, PAD, 5]],
}


@pytest.mark.parametrize("mode", ["greedy", "returns", "beams"])
@pytest.mark.parametrize("case", AMBIGUOUS)
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_pad_token_that_is_text(name: str, route: str, case: str, mode: str) -> None:
    """Only the mask tells padding from text."""
    model, prompts = llama(), AMBIGUOUS[case]
    guard, recorder = guard_of(model, CONTROLS[name]()), Recorder()
    out = generate(guard, route, left_padded(prompts, PAD), [recorder], pad_token_id=PAD, **MODES[mode])
    check_steps(guard, prompts, recorder.ids, out.scores)


@pytest.mark.parametrize("where", ["keyword", "config", "model_default"])
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_mask_that_transformers_infers(name: str, route: str, where: str) -> None:
    """Without attention_mask transformers takes pad tokens for padding: the guard reads the same text as the model."""
    model = llama()
    model.generation_config.pad_token_id = None
    guard, recorder = guard_of(model, CONTROLS[name]()), Recorder()
    settings: dict[str, Any] = {}
    if where == "keyword":
        settings["pad_token_id"] = PAD
    elif where == "config":
        settings["generation_config"] = GenerationConfig(pad_token_id=PAD, max_new_tokens=NEW)
    else:
        model.generation_config.pad_token_id = PAD
    prompts = [[60, 61, 62, 63], [7], [150, 2]]
    out = generate(guard, route, {"input_ids": left_padded(prompts, PAD)["input_ids"]}, [recorder], **settings)
    check_steps(guard, prompts, recorder.ids, out.scores)


# --- Processors reused and repeated ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [None, Gate(first_tokens=2)], ids=["always", "first_tokens"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_one_processor_serves_many_calls(name: str, gate: Gate | None) -> None:
    model = llama()
    guard = guard_of(model, CONTROLS[name](), gate=gate)
    reused = guard.logits_processor()

    def scores(inputs: dict[str, torch.Tensor], processor: Any) -> Any:
        settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
        return model.generate(**inputs, logits_processor=[processor], **settings)

    first = left_padded(PROMPTS)
    after_first = scores(first, guard.logits_processor()).sequences
    mask = torch.cat([first["attention_mask"], torch.ones(len(PROMPTS), NEW, dtype=torch.int64)], -1)
    calls = {
        "first": first,
        "other prompts": left_padded([[5, 6], [70, 71, 72]]),
        "first again": first,
        "goes on from the first": {"input_ids": after_first, "attention_mask": mask},
        "first once more": first,
        "a prefix that the first generated": {"input_ids": after_first[:, :-2], "attention_mask": mask[:, :-2]},
        "other padding": {"input_ids": first["input_ids"], "attention_mask": torch.ones_like(first["attention_mask"])},
    }
    for call, inputs in calls.items():
        fresh, again = scores(inputs, guard.logits_processor()), scores(inputs, reused)
        assert torch.equal(fresh.sequences, again.sequences), call
        assert all(torch.allclose(a.exp(), b.exp(), atol=CLOSE) for a, b in zip(fresh.scores, again.scores, strict=True)), call


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.sequences, other.sequences) and all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ANYWHERE)
def test_listed_twice_acts_once(name: str, mode: str) -> None:
    model = llama()
    settings = {"max_new_tokens": NEW, "top_k": 0, "return_dict_in_generate": True, "output_scores": True} | MODES[mode]

    def run(*processors: Any) -> Any:
        torch.manual_seed(5)
        return model.generate(**left_padded(PROMPTS), logits_processor=list(processors), **settings)

    guard = guard_of(model, CONTROLS[name]())
    once = run(guard.logits_processor())
    counted = guard.counters.as_dict()
    assert same(run(guard.logits_processor(), guard.logits_processor()), once)
    assert guard.counters.as_dict() == {key: 2 * count for key, count in counted.items()}, "the second one counted too"
    one = guard.logits_processor()
    assert same(run(one, one), once)
    other = guard_of(model, CONTROLS[name]())
    assert not same(run(guard.logits_processor(), other.logits_processor()), once), "another guard acts too"


@pytest.mark.parametrize("name", ANYWHERE)
def test_attached_and_listed_acts_once(name: str) -> None:
    guard = guard_of(llama(), CONTROLS[name]())
    once = generate(guard, "attach", left_padded(PROMPTS))
    assert same(generate(guard, "attach", left_padded(PROMPTS), [guard.logits_processor()]), once)


def test_listed_twice_with_rows_that_no_control_touches() -> None:
    """The gate shuts in some rows: they are counted once."""
    model = llama()
    guard = guard_of(model, CONTROLS["dexperts"](), gate=Gate(first_tokens=2))
    inputs = left_padded(PROMPTS)
    model.generate(**inputs, max_new_tokens=NEW, logits_processor=[guard.logits_processor()])
    once = guard.counters.as_dict()
    model.generate(**inputs, max_new_tokens=NEW, logits_processor=[guard.logits_processor(), guard.logits_processor()])
    assert guard.counters.as_dict() == {key: 2 * count for key, count in once.items()}
    assert once["rows_touched"] == 2 * len(PROMPTS)
