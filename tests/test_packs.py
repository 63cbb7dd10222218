"""Packs: written, verified, refused; in every control; and policies with controls fitted on single models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from odd_models import BAG, PROMPTS, byte_llama, byte_tokenizer, future
from odd_models import basis as columns
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import HIDDEN, llama, qwen2
from typer.testing import CliRunner

import moralguard as mg
from moralguard import packs
from moralguard.cli import app
from moralguard.controls import PPLM, Control, DExperts, FactoredHead, Fudge, NullspaceProjection, SelfDebias
from moralguard.decoding.gate import Gate
from moralguard.errors import GuardError, ModelError, PolicyError
from moralguard.packs import FILES, find_pack, read_pack, shipped_packs, write_pack
from moralguard.policy import Policy, policy_schema

KINDS = ("lora-expert", "prefix-head", "attribute-head", "subspace")
DATA = [{"name": "rows", "licence": "CC0-1.0", "rows": 12, "url": "https://example.org/rows"}]
WEIGHT = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(3))
HEAD = FactoredHead(
    torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4)),
    torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5)),
    bias=-0.5,
)


def basis(rank: int, seed: int = 5) -> torch.Tensor:
    return columns(rank, seed).contiguous()  # safetensors takes nothing else


U_OUT, MU = basis(2, seed=6), torch.linspace(-1, 1, HIDDEN)


def tiny(seed: int = 0) -> mg.LanguageModel:
    return mg.LanguageModel(llama(seed=seed), None, f"tiny-{seed}")


def fill(folder: Path, kind: str, model: Any) -> None:
    """The files of a pack, without its card."""
    folder.mkdir(parents=True)
    if kind == "lora-expert":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["down_proj"]))
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.4 * torch.randn_like(parameter)
        wrapped.save_pretrained(folder)
        (folder / "README.md").unlink()
    elif kind == "prefix-head":
        HEAD.save(folder)
    elif kind == "attribute-head":
        save_file({"weight": WEIGHT, "bias": torch.zeros(2)}, folder / "head.safetensors")
    else:
        save_file({"U_in": basis(2), "U_out": U_OUT, "mu": MU, "direction": basis(1)[:, 0]}, folder / "basis.safetensors")


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def call(kind: str, seed: int = 0, where: Path | None = None, lm: mg.LanguageModel | None = None, **card: Any) -> Path:
        folder = where or tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        fill(folder, kind, llama(seed=seed))
        arguments = {"settings": {"target": 0}, "metrics": {"accuracy": 0.75}, "data": DATA, "values": ["The text is calm."]} | card
        return write_pack(folder, kind=kind, method="test", lm=lm or tiny(seed), name="calm", description="A test.", **arguments)

    return call


@pytest.fixture
def shipped(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Packs of every kind, as if they came with the package under tiny/KIND."""
    root = tmp_path / "shipped_packs"
    monkeypatch.setattr(packs, "shipped_folder", lambda: root)
    for kind in KINDS:
        make(kind, where=root / "tiny" / kind)
    return make


def with_pack(kind: str, source: str | Path) -> Control:
    controls: dict[str, Callable[[], Control]] = {
        "lora-expert": lambda: DExperts(expert=source, alpha=1.5, filter_p=0.95),
        "prefix-head": lambda: Fudge(discriminator=source, strength=3.0, top_k=40),
        "attribute-head": lambda: PPLM(head=source, stepsize=0.5, num_iterations=2, gamma=1.0),
        "subspace": lambda: NullspaceProjection(basis=source, keep=0.1),
    }
    return controls[kind]()


def with_parts(kind: str, folder: Path) -> Control:
    """The same control from what lies in the pack, handed over as tensors (a bare adapter folder for an expert)."""
    if kind == "lora-expert":
        bare = folder.parent / "bare"
        shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("card.json"))
        return with_pack(kind, bare)
    if kind == "prefix-head":
        return Fudge(discriminator=HEAD, strength=3.0, top_k=40)
    if kind == "attribute-head":
        return PPLM(head=(WEIGHT, torch.zeros(2)), target=0, stepsize=0.5, num_iterations=2, gamma=1.0)
    return NullspaceProjection(basis=(basis(2), U_OUT, MU), keep=0.1)


def tokens(lm: Any, *controls: Control, **policy: Any) -> list[list[int]]:
    guard = mg.Guard(Policy(controls=list(controls), **policy), lm)
    return guard.generate([list(p) for p in PROMPTS], max_new_tokens=8, do_sample=True, seed=3).token_ids


def edit_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | changes))


# --- round trips --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "name"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_guards_as_its_parts_do(kind: str, how: str, shipped: Make) -> None:
    lm = tiny()
    folder = packs.shipped_folder() / "tiny" / kind
    source = str(folder) if how == "folder" else f"pack:tiny/{kind}"
    control = with_pack(kind, source)
    found = tokens(lm, control)
    assert found == tokens(lm, with_parts(kind, folder))
    assert found != tokens(lm)
    policy = Policy(controls=[control])
    assert source in policy.as_yaml(), "the setting stays the string that was given"
    again = Policy.load(policy.as_dict())
    assert again == policy
    assert again.digest == policy.digest
    assert tokens(lm, *again.effective_controls()) == found


def test_the_card(make: Make) -> None:
    lm = mg.LanguageModel(byte_llama(), byte_tokenizer(), "/home/somebody/models/tiny")
    card = read_pack(make("prefix-head", lm=lm), "prefix-head").card
    assert (card.format, card.kind, card.method, card.name, card.description) == (1, "prefix-head", "test", "calm", "A test.")
    assert card.values == ("The text is calm.",)
    assert card.base.model_dump() == {
        "name": "tiny",
        "fingerprint": lm.fingerprint,
        "tokenizer": lm.tokenizer_hash,
        "width": HIDDEN,
        "vocabulary": lm.vocab_size,
    }
    assert card.data[0].model_dump() == DATA[0]
    assert card.settings == {"target": 0}
    assert card.metrics == {"accuracy": 0.75}
    assert card.program["moralguard"] == mg.__version__
    assert card.program["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert list(card.files) == ["head.safetensors"]


def test_writing_again_gives_the_same_card(make: Make) -> None:
    assert (make("subspace") / "card.json").read_bytes() == (make("subspace") / "card.json").read_bytes()


def test_a_path_object_is_as_good_as_a_string(make: Make) -> None:
    folder = make("prefix-head")
    assert Fudge(discriminator=folder) == Fudge(discriminator=str(folder))


def test_target_and_direction_of_the_setting_go_before_the_pack_s(make: Make) -> None:
    lm = tiny()
    attribute, subspace = make("attribute-head"), make("subspace")
    arguments = {"stepsize": 0.5, "num_iterations": 2, "gamma": 1.0}
    mine = PPLM(head=str(attribute), target=1, **arguments)
    assert tokens(lm, mine) == tokens(lm, PPLM(head=(WEIGHT, torch.zeros(2)), target=1, **arguments))
    assert tokens(lm, mine) != tokens(lm, PPLM(head=str(attribute), **arguments))
    assert Policy.load(Policy(controls=[mine]).as_dict()).controls == (mine,), "a target that equals the default elsewhere is kept"
    leace, direction = (basis(2), U_OUT, MU), 50 * basis(1, seed=9)[:, 0]
    adaptive = NullspaceProjection(basis=str(subspace), adaptive=True)
    assert tokens(lm, adaptive) == tokens(lm, NullspaceProjection(basis=leace, adaptive=True, direction=basis(1)[:, 0]))
    given = NullspaceProjection(basis=str(subspace), adaptive=True, direction=direction)
    assert tokens(lm, given) == tokens(lm, NullspaceProjection(basis=leace, adaptive=True, direction=direction))
    assert tokens(lm, given) != tokens(lm, adaptive)


def test_bare_files_still_work_and_stay_strings(tmp_path: Path) -> None:
    lm = tiny()
    save_file({"basis": basis(2)}, tmp_path / "basis.safetensors")
    HEAD.save(tmp_path / "head.safetensors")
    files = [
        NullspaceProjection(basis=str(tmp_path / "basis.safetensors"), keep=0.2),
        Fudge(discriminator=str(tmp_path / "head.safetensors"), top_k=50),
    ]
    assert tokens(lm, *files) == tokens(lm, NullspaceProjection(basis=basis(2), keep=0.2), Fudge(discriminator=HEAD, top_k=50))
    policy = Policy(controls=files)
    assert Policy.load(policy.as_dict()) == policy
    assert torch.allclose(files[0].projection(), torch.eye(HIDDEN) - basis(2) @ basis(2).T, atol=1e-6)


def test_attach_and_logits_processor(make: Make) -> None:
    lm = tiny()
    expert, prefix = with_pack("lora-expert", make("lora-expert")), with_pack("prefix-head", make("prefix-head"))
    guard = mg.Guard(Policy(controls=[expert, prefix]), lm)
    expected = guard.generate([[1, 2, 3]], max_new_tokens=6, do_sample=False).token_ids[0]
    with guard.attach() as model:
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist() == expected
    # a pack's head reads the states from a row of the guard's own; given as an object it is refused, naming attach
    found = lm.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False, logits_processor=[guard.logits_processor()])
    assert found[0, 3:].tolist() == expected
    with pytest.raises(GuardError, match="attach"):
        mg.Guard(Policy(controls=[Fudge(discriminator=HEAD)]), lm).logits_processor()


def test_a_subspace_pack_under_a_logits_processor(make: Make) -> None:
    lm = tiny()
    guard = mg.Guard(Policy(controls=[with_pack("subspace", make("subspace"))]), lm)
    for prompt in ([1, 2, 3], [9, 8]):
        ids = torch.tensor([prompt])
        expected = guard.generate([prompt], max_new_tokens=6, do_sample=False).token_ids[0]
        found = lm.model.generate(ids, max_new_tokens=6, do_sample=False, logits_processor=[guard.logits_processor()])
        assert found[0, len(prompt) :].tolist() == expected


# --- refusals -----------------------------------------------------------------------------------------------------------------


def test_a_pack_of_another_model(make: Make) -> None:
    mine, other = tiny(0), tiny(1)
    for kind in KINDS:
        folder = make(kind, seed=1)
        control = with_pack(kind, folder)
        with pytest.raises(ModelError) as caught:
            mg.Guard(Policy(controls=[control]), mine)
        for said in (mine.fingerprint, other.fingerprint, "tiny-0", "tiny-1", kind, "moralguard fit"):
            assert said in str(caught.value), said
        mg.Guard(Policy(controls=[control]), other)


def test_every_side_that_differs_is_named(make: Make) -> None:
    lm = mg.LanguageModel(byte_llama(), byte_tokenizer(), "bytes")
    pack = read_pack(make("prefix-head", lm=lm))
    pack.check(lm)
    pack.check(mg.LanguageModel(lm.model, None)), "token ids need no tokenizer"
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=f"tokenizer {lm.tokenizer_hash}, here") as caught:
        pack.check(mg.LanguageModel(lm.model, other))
    assert "fingerprint" not in str(caught.value)
    with pytest.raises(ModelError, match=f"vocabulary size {lm.vocab_size}, here 199"):
        pack.check(tiny())
    edit_card(pack.folder, base=pack.card.base.model_dump() | {"width": 48})
    with pytest.raises(ModelError, match="hidden width 48, here 32"):
        read_pack(pack.folder).check(lm)


def rehash(folder: Path) -> None:
    edit_card(folder, files={path.name: packs._sha256(path) for path in folder.iterdir() if path.name != "card.json"})


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])


def not_finite(folder: Path) -> None:
    save_file({"weight": WEIGHT / 0, "bias": torch.zeros(2)}, next(folder.glob("*.safetensors")))
    rehash(folder)


def flip(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "sha256"),
    "truncated, with its hash": (lambda folder: (truncate(folder), rehash(folder)), "can't be read as a safetensors file"),
    "not finite": (not_finite, "aren't finite, in weight"),
    "another file than the card says": (flip, "isn't the file that card.json names: sha256"),
    "a lying hash": (lambda f: edit_card(f, files=dict.fromkeys(json.loads((f / "card.json").read_text())["files"], "0" * 64)), "0" * 64),
    "a hash that is none": (lambda f: edit_card(f, files={"head.safetensors": "0"}), "isn't a pack's card: .*files"),
    "an extra file": (lambda folder: (folder / "extra.json").write_text("{}"), "holds extra.json, which its card.json doesn't name"),
    "a pickle": (lambda folder: (folder / "head.pkl").write_bytes(b"x"), "holds head.pkl; a pack is a flat folder"),
    "a folder": (lambda folder: (folder / "more.json").mkdir(), "holds more.json; a pack is a flat folder"),
    "a missing file": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "lacks .*safetensors"),
    "a file outside": (lambda f: edit_card(f, files={"../card.json": "0" * 64}), "lacks ../card.json"),
    "a card that needs too little": (lambda f: ([p.unlink() for p in f.glob("*.safetensors")], rehash(f)), "lacks .*safetensors"),
    "no card": (lambda folder: (folder / "card.json").unlink(), "card.json"),
    "a card that is no JSON": (lambda folder: (folder / "card.json").write_text("{"), "can't be read as JSON"),
    "a card of nothing but brackets": (lambda folder: (folder / "card.json").write_text("[" * 100_000), "can't be read as JSON"),
    "a card that is a list": (lambda folder: (folder / "card.json").write_text("[]"), "holds a list"),
    "another format": (lambda f: edit_card(f, format=2), "is of format 2; this moralguard .* reads 1"),
    "an unknown kind": (lambda f: edit_card(f, kind="weights"), "is of kind 'weights'; expected one of lora-expert"),
    "an unknown key": (lambda f: edit_card(f, metric={}), "no setting 'metric'; did you mean 'metrics'"),
    "a base without a fingerprint": (lambda f: edit_card(f, base={"name": "x", "width": 3, "vocabulary": 4}), "fingerprint"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_pack(how: str, make: Make) -> None:
    folder = make("attribute-head")
    act, said = BREAKS[how]
    act(folder)
    with pytest.raises(ModelError, match=said) as caught:
        read_pack(folder)
    assert str(folder) in str(caught.value)
    with pytest.raises(PolicyError, match=said):
        PPLM(head=str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_a_lying_pack_is_refused_when_the_control_is_made(kind: str, make: Make) -> None:
    folder = make(kind)
    flip(folder)
    with pytest.raises(PolicyError, match=r"isn't the file that card\.json names"):
        with_pack(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_that_was_changed_after_the_control_was_made(kind: str, make: Make) -> None:
    folder = make(kind)
    policy = Policy(controls=[with_pack(kind, folder)])
    flip(folder)
    with pytest.raises(ModelError, match=r"isn't the file that card\.json names"):
        mg.Guard(policy, tiny())


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_of_another_kind(kind: str, make: Make) -> None:
    other = KINDS[KINDS.index(kind) - 1]
    folder = make(other)
    with pytest.raises(PolicyError, match=f"is a pack of kind '{other}'; expected one of kind '{kind}'"):
        with_pack(kind, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_that_is_not_there(kind: str, shipped: Make) -> None:
    near = f"tiny/{kind[:-1]}"
    with pytest.raises(PolicyError, match=f"no shipped pack '{near}'; did you mean 'tiny/{kind}'"):
        with_pack(kind, f"pack:{near}")


@pytest.mark.parametrize(
    "name", ["../tiny", "tiny/../../x", "/etc", "", ".", "tiny//subspace", "tiny/", "C:\\x", "tiny\\subspace", "tiny/.hidden", "a\0b"]
)
def test_names_that_lead_elsewhere(name: str, shipped: Make) -> None:
    with pytest.raises(ModelError, match="names no shipped pack"):
        find_pack(f"pack:{name}")


def test_shipped_packs(shipped: Make) -> None:
    assert shipped_packs() == sorted(f"tiny/{kind}" for kind in KINDS)
    assert find_pack("pack:tiny/subspace") == packs.shipped_folder() / "tiny" / "subspace"


def test_every_pack_that_comes_with_the_package_is_whole() -> None:
    for name in shipped_packs():
        card = read_pack(f"pack:{name}").card
        assert card.data
        assert all(row.licence for row in card.data)
        assert card.metrics


def test_an_adaptation_of_the_discriminator_is_no_pack_of_a_control(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"format": 1, "kind": "discriminator-adaptation"}))
    with pytest.raises(PolicyError, match="kind 'discriminator-adaptation'"):
        Fudge(discriminator=str(tmp_path))


def test_a_model_folder_with_a_card_is_a_model(tmp_path: Path) -> None:
    llama(seed=5).save_pretrained(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    assert tokens(tiny(), DExperts(expert=str(tmp_path))) == tokens(tiny(), DExperts(expert=llama(seed=5)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_written(kind: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"kind": kind, "method": "test", "lm": tiny(), "name": "x", "data": [], "settings": {}, "metrics": {}}
    with pytest.raises(ModelError, match="isn't a folder"):
        write_pack(tmp_path / "none", **arguments)
    folder = tmp_path / "pack"
    fill(folder, kind, llama())
    with pytest.raises(PolicyError, match="metrics of pack 'x' can't be written as JSON"):
        write_pack(folder, **arguments | {"metrics": {"loss": float("nan")}})
    with pytest.raises(PolicyError, match="licence"):
        write_pack(folder, **arguments | {"data": [{"name": "rows", "rows": 3}]})
    (folder / "README.md").write_text("peft's")
    with pytest.raises(ModelError, match=r"holds README\.md"):
        write_pack(folder, **arguments)
    (folder / "README.md").unlink()
    (folder / FILES[kind][-1]).unlink()
    with pytest.raises(ModelError, match=f"lacks {re.escape(FILES[kind][-1])}"):
        write_pack(folder, **arguments)
    assert not (folder / "card.json").exists()


def test_heads_that_do_not_fit_their_card(make: Make) -> None:
    with pytest.raises(PolicyError, match="target is 2, but the head has classes 0 to 1"):
        PPLM(head=str(make("attribute-head", settings={"target": 2})))
    for elsewhere in ({"layer": 1, "pooling": "mean"}, {"layer": -1, "pooling": "last"}):
        with pytest.raises(PolicyError, match="pplm steers by a head on the mean of the last states"):
            PPLM(head=str(make("attribute-head", settings={"target": 0} | elsewhere)))
    untold = str(make("attribute-head", settings={}))
    with pytest.raises(PolicyError, match="target is None, but"):
        PPLM(head=untold)
    assert PPLM(head=untold, target=1).attribute()[2] == 1
    with pytest.raises(PolicyError, match=r"no card\.json"):
        PPLM(head="nowhere")


# --- fingerprints -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, qwen2])
def test_the_fingerprint_is_of_the_weights_and_not_of_the_dtype(build: Callable[..., Any], tmp_path: Path) -> None:
    half = build().to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    prints = {mg.load_model(tmp_path, dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")}
    assert prints == {mg.LanguageModel(half).fingerprint}
    assert prints == {mg.LanguageModel(build()).fingerprint}, "weights of float32 are rounded as loading rounds them"
    assert prints != {mg.LanguageModel(build(seed=1)).fingerprint}


def test_a_pack_fits_its_model_in_both_dtypes(make: Make) -> None:
    folder = make("prefix-head")
    tokens(mg.LanguageModel(llama().to(torch.bfloat16)), with_pack("prefix-head", folder))


def test_the_tokenizer_s_hash() -> None:
    assert tiny().tokenizer_hash is None
    first, again = (mg.LanguageModel(byte_llama(), byte_tokenizer()).tokenizer_hash for _ in range(2))
    assert first == again
    assert first is not None
    assert len(first) == 16


# --- policies fitted on single models -----------------------------------------------------------------------------------------


def fitted_policy(lm: mg.LanguageModel, control: Control, gate: Gate | None = None) -> Policy:
    entry = {"model": lm.name, "fingerprint": lm.fingerprint, "controls": [control], "gate": gate}
    general = SelfDebias(prefixes=[[9, 8]], decay_constant=100)
    return Policy(name="both", controls=[general], gate=Gate(min_entropy=0.1), fitted=[entry])


def test_a_fitted_entry_acts_on_its_model_alone(make: Make) -> None:
    mine, other = tiny(0), tiny(1)
    control = with_pack("subspace", make("subspace"))
    policy = fitted_policy(mine, control)
    guard = mg.Guard(policy, mine)
    assert guard.fitted == "tiny-0"
    assert guard.policy is policy
    assert guard.gate is None, "an entry without a gate always acts"
    assert [bound.settings for bound in guard.controls] == [control]
    elsewhere = mg.Guard(policy, other)
    assert elsewhere.fitted is None
    assert elsewhere.gate is not None
    assert elsewhere.gate.settings == policy.gate
    assert [bound.settings for bound in elsewhere.controls] == list(policy.controls or ())
    run = {"max_new_tokens": 8, "do_sample": True, "seed": 3}
    prompts = [list(p) for p in PROMPTS]
    assert guard.generate(prompts, **run).token_ids == tokens(mine, control)
    assert elsewhere.generate(prompts, **run).token_ids == tokens(other, *(policy.controls or ()), gate=policy.gate)


@pytest.mark.parametrize("general", [None, Gate(first_tokens=1)])
def test_the_gate_of_the_entry_is_used_everywhere(general: Gate | None) -> None:
    """A control that forbids half of the vocabulary, for two tokens only."""
    lm = tiny()
    fudge = Fudge(discriminator=future, strength=8.0, top_k=30)
    guard = mg.Guard(fitted_policy(lm, fudge, Gate(first_tokens=2)).replaced(gate=general), lm)
    alone = mg.Guard(Policy(controls=[fudge], gate=Gate(first_tokens=2)), lm)
    ungated = mg.Guard(Policy(controls=[fudge]), lm)

    def everywhere(guard: mg.Guard) -> list[list[int]]:
        ids = torch.tensor([[1, 2, 3]])
        arguments = {"max_new_tokens": 6, "do_sample": False}
        own = guard.generate([[1, 2, 3]], **arguments).token_ids[0]
        processed = lm.model.generate(ids, logits_processor=[guard.logits_processor()], **arguments)[0, 3:].tolist()
        with guard.attach() as model:
            attached = model.generate(ids, **arguments)[0, 3:].tolist()
        return [own, processed, attached]

    found = everywhere(guard)
    assert found == everywhere(alone)
    assert found != everywhere(ungated)
    assert all(one == found[0] for one in found)


def test_without_entries_the_weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_lm: Any) -> str:
        raise AssertionError("the fingerprint was computed")

    monkeypatch.setattr(mg.LanguageModel, "fingerprint", property(read))
    guard = mg.Guard(Policy(controls=[SelfDebias(prefixes=[[9, 8]])]), tiny())
    assert guard.fitted is None


def test_fitted_entries_as_data(make: Make, tmp_path: Path) -> None:
    lm = tiny()
    policy = fitted_policy(lm, with_pack("subspace", make("subspace")), Gate(first_tokens=5))
    again = Policy.load(policy.as_dict())
    assert again == policy
    assert again.digest == policy.digest
    file = tmp_path / "policy.yaml"
    file.write_text(policy.as_yaml())
    assert Policy.load(file) == policy
    (entry,) = policy.as_dict()["fitted"]
    assert entry["controls"][0]["control"] == "nullspace@1"
    assert entry["gate"] == {"first_tokens": 5}
    assert policy.replaced(fitted=()).digest != policy.digest
    assert "fitted" not in policy.replaced(fitted=()).as_dict()
    schema = Draft202012Validator(policy_schema())
    schema.validate(policy.as_dict())
    wrong = policy.as_dict()
    wrong["fitted"][0]["controls"][0]["keap"] = 1
    assert not schema.is_valid(wrong)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"fingerprint": "xyz"}, r"fitted\.0: .*fingerprint"),
        ({"controls": None}, r"fitted\.0: .*controls"),
        ({"controls": [{"control": "nullspace@1", "basis": "/nowhere"}]}, "/nowhere.*isn't there"),
        ({"contrls": []}, "no setting 'contrls'; did you mean 'controls'"),
    ],
)
def test_mistakes_in_entries_are_named(entry: dict[str, Any], message: str) -> None:
    whole = {"model": "tiny", "fingerprint": "0" * 16, "controls": []}
    with pytest.raises(PolicyError, match=message):
        Policy.load({"fitted": [whole | entry]})
    with pytest.raises(PolicyError, match="several fitted entries with fingerprint 0000000000000000"):
        Policy.load({"fitted": [whole, whole]})
    with pytest.raises(PolicyError, match="several fitted entries"):
        Policy.load({"fitted": [whole | {"runtime": "onnx"}, whole]})


# --- the command line ---------------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    error = "" if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    return done.exit_code, done.stdout, done.stderr + error


def test_pack_show(make: Make) -> None:
    folder = make("prefix-head", metrics={"accuracy": 0.75, "note": "[red]no markup[/] \x1b[31m"})
    code, shown, _ = run("pack", "show", folder)
    assert code == 0
    for said in ("prefix-head", "calm", "The text is calm.", tiny().fingerprint, "rows: 12 rows, CC0-1.0", "0.75", "[red]no markup[/]"):
        assert said in shown, said
    assert "\x1b[31m" not in shown
    flip(folder)
    code, _, error = run("pack", "show", folder)
    assert code == 1
    assert "sha256" in error


def test_pack_check(make: Make, tmp_path: Path) -> None:
    folder = make("lora-expert")
    for seed in (0, 1):
        llama(seed=seed).save_pretrained(tmp_path / f"model-{seed}")
    assert run("pack", "check", folder)[0] == 0
    code, shown, _ = run("pack", "check", folder, "--model", tmp_path / "model-0")
    assert code == 0
    assert tiny().fingerprint in shown
    code, _, error = run("pack", "check", folder, "--model", tmp_path / "model-1")
    assert code == 1
    assert tiny(0).fingerprint in error
    assert tiny(1).fingerprint in error
    flip(folder)
    code, _, error = run("pack", "check", folder)
    assert code == 1
    assert "sha256" in error
    assert run("pack", "check", "pack:../x")[0] == 1


def test_pack_list(shipped: Make) -> None:
    code, shown, _ = run("pack", "list")
    assert code == 0
    assert all(f"pack:tiny/{kind}" in shown for kind in KINDS)


def test_generate_and_check_say_which_controls_act(make: Make, tmp_path: Path) -> None:
    byte_llama().save_pretrained(tmp_path / "bytes")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    lm = mg.load_model(tmp_path / "bytes")
    arguments = ("--model", tmp_path / "bytes", "--max-new-tokens", "4", "--compare")
    pack = make("subspace", lm=lm)
    for fingerprint, acts in ((lm.fingerprint, True), ("0" * 16, False)):
        policy = fitted_policy(lm, with_pack("subspace", pack))
        (entry,) = policy.fitted
        file = tmp_path / f"policy-{acts}.yaml"
        file.write_text(policy.replaced(fitted=[entry.replaced(fingerprint=fingerprint)]).as_yaml())
        code, shown, error = run("generate", "ab", "--policy", file, *arguments, "--json")
        assert code == 0, error
        assert ("moralguard fit" in error) is not acts
        (completion,) = json.loads(shown)["completions"]
        assert set(completion["trace"][0]["contributions"]) <= ({"nullspace"} if acts else {"self-debias"})
        plain = mg.Guard(Policy(controls=()), lm).generate("ab", seed=0, max_new_tokens=4).texts
        assert [completion["unguarded_text"]] == plain, "--compare leaves the fitted controls out too"
        code, shown, _ = run("policy", "check", file, "--model", tmp_path / "bytes")
        assert code == 0
        assert ("nullspace@1" in shown) is acts
        assert ("general controls act" in shown) is not acts
    assert "moralguard fit" not in run("generate", "ab", "--value", "The text is calm.", *arguments, "--json")[2]


def test_bags_and_heads_of_packs_together(make: Make) -> None:
    lm = tiny()
    both = PPLM(head=str(make("attribute-head")), bag_of_words=[BAG], stepsize=0.3, num_iterations=1)
    assert tokens(lm, both) == tokens(lm, both.replaced(head=(WEIGHT, torch.zeros(2)), target=0))
