"""Adapters beside the model: different ones in one pack, against Diffusers and each alone."""

import gc
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file

from krea2_srt.engine.lifecycle import lone_sequence
from krea2_srt.errors import AdapterError, RequestError
from krea2_srt.kernels.quantize import quantize_tokens
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.lora.beside import PackDeltas, Run, UniformDeltas
from krea2_srt.lora.merge import merge
from krea2_srt.lora.placed import NO_ADAPTERS, AdapterSet, PlacedAdapter
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.quantization import SERVED, Quantization, QuantizedLinear, meaning
from krea2_srt.request import AdapterUse, ImageRequest, RequestLimits
from krea2_srt.runner.graphs import Eager, StepGraphs
from krea2_srt.runner.model_runner import Krea2Runner
from tests.comparisons import CPU, PROMPT, relative_error
from tests.dialects import all_matrices, write_int8
from tests.torch.lora.forms import FORMS, random_pairs
from tests.torch.lora.oracle import inputs
from tests.torch.runner.recorded_graph import record
from tests.torch.runner.test_graphs import MAX_TOKENS, device_attention

BOUND = 2e-5


@pytest.fixture(scope="module")
def adapters(config, tmp_path_factory) -> dict[str, Adapter]:
    """Three of all matrices, one of the blocks alone."""
    found = {}
    for seed, name in enumerate(("a", "b", "c")):
        folder = tmp_path_factory.mktemp(name)
        path = FORMS[0].write(random_pairs(config, rank=4 + seed, seed=seed), folder)
        found[name] = replace(read_adapter(path, config), name=name)
    blocks = {linear: f for linear, f in found["a"].matrices.items() if linear.startswith("blocks")}
    assert 0 < len(blocks) < len(found["a"].matrices)
    return found | {"blocks": Adapter("blocks", "of the blocks", blocks)}


@pytest.fixture(scope="module")
def loaded(demo_model, adapters) -> Krea2Runner:
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)
    for adapter in adapters.values():
        runner.adapters.add(adapter)
    return runner


@pytest.fixture
def uses(adapters):
    def uses(**scales: float) -> frozenset[AdapterUse]:
        return frozenset(AdapterUse(n, adapters[n].digest, scale) for n, scale in scales.items())

    return uses


def latents(runner: Krea2Runner, *packs: list[ImageRequest]) -> list[list[torch.Tensor]]:
    """Latents of images, each list in one pack until its members are done."""
    found = []
    for images in packs:
        states = runner.encode_sequences([lone_sequence(image) for image in images])
        runner.begin(states)
        while pending := [state for state in states if not state.done]:
            assert runner.step(pending) == []
        found.append([state.tokens for state in states])
    return found


def test_a_step_is_what_diffusers_does_with_the_factors(
    loaded, adapters, pairs, diffusers_velocity
):
    used = AdapterSet.of((PlacedAdapter.on_host(loaded.dit, adapters["a"]), 1.0))
    theirs = diffusers_velocity(pairs)
    assert relative_error(theirs, diffusers_velocity({})) > 0.1
    assert relative_error(inputs().ours(loaded.dit, used), theirs) <= BOUND


def test_beside_is_what_merged_is(loaded, adapters, config, demo_model):
    scales = {"a": 0.7, "b": -0.4}
    deltas = merge([(adapters[name], scale) for name, scale in scales.items()], config)
    merged = load_dit(demo_model / "transformer", CPU, torch.float32, deltas=deltas)
    placed = [(PlacedAdapter.on_host(loaded.dit, adapters[n]), s) for n, s in scales.items()]
    beside = inputs().ours(loaded.dit, AdapterSet.of(*placed))
    assert relative_error(beside, inputs().ours(merged)) <= BOUND


def mixed(uses) -> list[ImageRequest]:
    """Sizes, steps, guidance, and adapters: some, none, another of the same prompt, the same
    again beside it, four at once.
    """
    return [
        ImageRequest(PROMPT, 64, 96, 4, seed=1, adapters=uses(a=1.0)),
        ImageRequest(PROMPT, 64, 64, 4, seed=2),
        ImageRequest(PROMPT, 96, 48, 3, 3.5, "rain", seed=3, adapters=uses(b=0.7)),
        ImageRequest(PROMPT, 32, 48, 5, seed=4, adapters=uses(b=0.7)),
        ImageRequest("x", 64, 64, 4, seed=5, adapters=uses(a=0.5, b=0.5, c=-1.0, blocks=0.5)),
    ]


def test_images_of_a_pack_are_each_as_alone(loaded, uses):
    images = mixed(uses)
    together, *alone = latents(loaded, images, *([image] for image in images))
    for image, got, (expected,) in zip(images, together, alone, strict=True):
        assert relative_error(got, expected) <= BOUND, image
    base = latents(loaded, [replace(image, adapters=frozenset()) for image in images])[0]
    for image, got, without in zip(images, together, base, strict=True):
        if image.adapters:
            assert relative_error(got, without) > 0.1, image
        else:
            assert torch.equal(got, without), image


def test_at_scale_0_an_image_is_the_base_models_to_the_bit(loaded, uses):
    image = ImageRequest(PROMPT, 64, 48, 3, seed=1)
    scaled = [replace(image, adapters=uses(a=scale)) for scale in (0.0, 1.0)]
    (base,), (nothing,), (all_of_it,) = latents(loaded, [image], *([one] for one in scaled))
    assert torch.equal(nothing, base)
    assert relative_error(all_of_it, base) > 0.1


def test_what_is_remembered_of_a_prompt_and_a_schedule_is_known_by_the_adapters(loaded, uses):
    """The same prompt and steps with others in between: nothing is mixed up."""
    image = ImageRequest("a remembered prompt", 48, 48, 3, seed=1)
    asked = [replace(image, adapters=uses(**{n: 1.0})) for n in ("a", "b", "a")]
    first, other, again = (one for (one,) in latents(loaded, *([one] for one in asked)))
    assert torch.equal(first, again)
    assert relative_error(first, other) > 0.1


def test_an_adapter_of_the_blocks_shares_what_is_remembered(loaded, uses):
    image = ImageRequest("a shared prompt", 48, 48, 3, seed=1)
    latents(loaded, [image])
    misses = loaded.contexts.misses, loaded._modulations.misses
    latents(loaded, [replace(image, adapters=uses(blocks=1.0))])
    assert (loaded.contexts.misses, loaded._modulations.misses) == misses


def test_a_step_in_slices_of_blocks_is_a_step(loaded, uses):
    image = ImageRequest(PROMPT, 64, 48, 2, 2.0, "rain", seed=1, adapters=uses(a=1.0))
    ((expected,),) = latents(loaded, [image])
    (state,) = loaded.encode_sequences([lone_sequence(image)])
    loaded.begin([state])
    with torch.inference_mode():
        while not state.done:
            forward = loaded.begin_step([state])
            for block in range(loaded.num_blocks):
                forward.run(range(block, block + 1))
            forward.finish()
    assert torch.equal(state.tokens, expected)


def test_with_graphs_only_packs_without_adapters_are_replayed(loaded, uses, monkeypatch):
    image = ImageRequest(PROMPT, 64, 48, 3, seed=1)
    adapted = replace(image, adapters=uses(a=1.0))
    ((expected,),) = latents(loaded, [adapted])
    graphs = StepGraphs(loaded.dit, device_attention, record, MAX_TOKENS, max_segments=8)
    monkeypatch.setattr(loaded, "graphs", graphs)
    latents(loaded, *[[image]] * 3)
    replayed = graphs.record.replayed
    assert replayed > 0
    ((found,),) = latents(loaded, [adapted])
    assert graphs.record.replayed == replayed
    assert graphs.record.eager[Eager.ADAPTERS] == image.steps
    assert torch.equal(found, expected)
    (state,) = loaded.encode_sequences([lone_sequence(adapted)])
    loaded.begin([state])
    assert not loaded.prepare([state])


@pytest.mark.parametrize(
    ("quantization", "error"),
    [(SERVED["fp8"], 0.05), (Quantization("fp8", rotation=True), 0.05), (SERVED["int8"], 0.02)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_beside_a_base_in_8_bits_a_delta_stays_within_a_percent(demo_model, quantization, error):
    """It is that of tokens in full precision, but for what quantising them costs."""
    dit = load_dit(demo_model / "transformer", CPU, torch.float32, quantization)
    linear = dit.blocks[0].ff.down
    assert isinstance(linear, QuantizedLinear)
    generator = torch.Generator().manual_seed(0)
    out, width = linear.weight.shape
    down = torch.randn(8, width, generator=generator) / width**0.5
    up = torch.randn(out, 8, generator=generator)
    adapter = Adapter("x", "x", {"blocks.0.ff.down": (Factor(down, up),)})
    x = torch.randn(512, width, generator=generator)
    tokens = quantize_tokens(x, linear.format)
    deltas = UniformDeltas(AdapterSet.of((PlacedAdapter.on_host(dit, adapter), 1.0)))
    delta = linear(tokens, deltas) - linear(tokens)
    exact = meaning(tokens, linear.format)
    assert relative_error(delta, (exact @ down.T) @ up.T) <= 1e-4
    of_tokens = (x @ down.T) @ up.T
    kept = (delta * of_tokens).sum() / of_tokens.square().sum()
    assert abs(kept - 1) < 0.01
    assert relative_error(delta, of_tokens) < error


@pytest.fixture(scope="module")
def int8_file(original_file, tmp_path_factory) -> Path:
    """The demo's transformer as a file in int8: q, k, v and gate rotated in 64, down not at all."""
    file = tmp_path_factory.mktemp("int8") / "some.safetensors"
    groups = {"attn.wo": 256, "mlp.gate": 256, "mlp.up": 256, "mlp.down": 0}
    write_int8(
        load_file(original_file),
        file,
        group=lambda stem: next((g for end, g in groups.items() if stem.endswith(end)), 64),
        chooses=lambda name, tensor: name.startswith("blocks.") and all_matrices(name, tensor),
    )
    return file


@pytest.mark.parametrize(
    ("stored", "keep"), [(False, ()), (False, ("0.*", "*.ff.down")), (True, ())]
)
def test_in_int8_a_step_with_an_adapter_is_off_by_no_more_than_without(
    loaded, adapters, demo_model, int8_file, stored, keep
):
    """Also where some matrices are not quantised, or have a rotation of their own."""
    path = int8_file if stored else demo_model / "transformer"
    dit = load_dit(path, CPU, torch.float32, replace(SERVED["int8"], keep=keep))
    rotations = {m.format.rotation for m in dit.modules() if isinstance(m, QuantizedLinear)}
    assert rotations == ({0, 64, 256} if stored else {256})
    errors = {}
    for scale in (0.0, 1.0):
        beside, expected = (
            inputs().ours(one, AdapterSet.of((PlacedAdapter.on_host(one, adapters["a"]), scale)))
            for one in (dit, loaded.dit)
        )
        errors[scale] = relative_error(beside, expected)
    assert 0 < errors[0.0] < 0.03
    assert errors[1.0] < 1.5 * errors[0.0]


def test_in_int8_images_of_a_pack_are_each_as_alone(adapters, demo_model, uses):
    """Up to tokens that round to the next step; without an adapter, as in a pack without any."""
    checkpoint = Krea2Checkpoint.from_folder(demo_model)
    runner = Krea2Runner.load(checkpoint, CPU, torch.float32, quantization=SERVED["int8"])
    for name in "ab":
        runner.adapters.add(adapters[name])
    images = [replace(image, steps=2) for image in mixed(uses)[:4]]
    together, *alone = latents(runner, images, *([image] for image in images))
    base = latents(runner, [replace(image, adapters=frozenset()) for image in images])[0]
    for image, got, (expected,), without in zip(images, together, alone, base, strict=True):
        assert relative_error(got, expected) < 0.01, image
        if image.adapters:
            assert relative_error(got, without) > 0.1, image
        else:
            assert torch.equal(got, without), image


def test_equal_neighbours_are_one_run(loaded, adapters):
    a, b = (PlacedAdapter.on_host(loaded.dit, adapters[name]) for name in "ab")
    one, other = AdapterSet.of((a, 1.0), (b, 0.5)), AdapterSet.of((b, 0.5), (a, 1.0))
    assert one == other
    less = AdapterSet.of((a, 1.0), (b, 0.0))
    spans = [(0, 3), (3, 5), (5, 6), (6, 9), (9, 10)]
    deltas = PackDeltas.of(spans, [one, other, less, NO_ADAPTERS, less])
    assert deltas.runs == (Run(0, 5, one), Run(5, 6, less), Run(9, 10, less))
    assert PackDeltas.of(spans, [NO_ADAPTERS] * 5) is None


def test_images_of_one_size_take_two_products_for_all(loaded, config, tmp_path):
    """Also with two adapters each; not where ranks or lengths differ."""
    uses = []
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        path = FORMS[0].write(random_pairs(config, rank=4, seed=30 + seed), tmp_path / str(seed))
        uses.append(AdapterUse(str(seed), loaded.adapters.load(path).digest, 0.5 + seed / 4))
    for sets in ([{one} for one in uses], [{uses[0], uses[1]}, {uses[2], uses[3]}]):
        images = [
            ImageRequest(PROMPT, 48, 48, 2, seed=seed, adapters=frozenset(some))
            for seed, some in enumerate(sets)
        ]
        states = loaded.encode_sequences([lone_sequence(image) for image in images])
        loaded.begin(states)
        for _ in range(2):
            loaded.step(states)
        deltas = states[0].deltas
        assert deltas._at_once
        assert all(stacked is not None for stacked in deltas._at_once.values())
        for image, state in zip(images, states, strict=True):
            ((alone,),) = latents(loaded, [image])
            assert relative_error(state.tokens, alone) <= BOUND


def test_an_adapter_that_is_not_loaded_fails_and_the_runner_goes_on(loaded, uses):
    image = ImageRequest(PROMPT, 48, 48, 1, adapters=frozenset({AdapterUse("d", "unknown")}))
    with pytest.raises(AdapterError, match="adapter d: it is not loaded"):
        loaded.encode_sequences([lone_sequence(image)])
    latents(loaded, [replace(image, adapters=uses(a=1.0))])


def test_an_adapter_of_another_model_is_refused(loaded):
    pool = AdapterPool(loaded.dit)
    for name, factor in {
        "blocks.99.attn.out": Factor(torch.ones(1, 256), torch.ones(256, 1)),
        "img_in": Factor(torch.ones(1, 65), torch.ones(256, 1)),
        "final_linear": Factor(torch.ones(1, 256), torch.ones(64, 1), start=1),
        "blocks.0": Factor(torch.ones(1, 256), torch.ones(64, 1)),
    }.items():
        with pytest.raises(AdapterError, match=f"adapter x: its {name} is not this model's"):
            pool.add(Adapter("x", name, {name: (factor,)}))
    assert len(pool.on_device) == len(pool.on_host) == 0


def test_the_least_recently_used_adapter_makes_room(loaded, adapters):
    a, b, c = (adapters[name] for name in "abc")
    sizes = [PlacedAdapter.on_host(loaded.dit, one).nbytes for one in (a, b)]
    pool = AdapterPool(loaded.dit, sum(sizes), max_host_bytes=0)
    pool.add(a)
    pool.add(b)
    pool.find([AdapterUse("a", a.digest)])
    pool.add(replace(c, matrices=a.matrices))
    assert [digest in pool.on_device for digest in (a.digest, b.digest, c.digest)] == [1, 0, 1]
    assert pool.on_device.nbytes <= sum(sizes)
    assert pool.on_device.evictions == 1


def test_who_has_an_adapter_keeps_it_and_it_counts(loaded, adapters):
    a, b = adapters["a"], adapters["b"]
    sizes = [PlacedAdapter.on_host(loaded.dit, one).nbytes for one in (a, b)]
    pool = AdapterPool(loaded.dit, sizes[0], max_host_bytes=0)
    held = [pool.add(a)]
    pool.add(b)
    assert a.digest in pool.on_device, "it would be copied there a second time"
    assert pool.on_device.nbytes == sum(sizes)
    assert pool.find([AdapterUse("a", a.digest)]).uses[0][0] is held[0]
    held.clear()
    pool.add(b)
    assert pool.on_device.nbytes <= sum(sizes)
    assert not pool.fit([a.digest, b.digest])
    assert pool.fit([a.digest])
    assert pool.fit([a.digest, "not known"])


def test_one_that_left_the_device_comes_back_from_the_host(loaded, adapters):
    a, b = adapters["a"], adapters["b"]
    pool = AdapterPool(loaded.dit, max_bytes=0)
    pool.add(a)
    pool.add(b)
    assert [pool.where(x.digest) for x in (a, b)] == ["host", "device"]
    pool.find([AdapterUse("a", a.digest)])
    assert [pool.where(x.digest) for x in (a, b)] == ["device", "host"]
    assert (pool.uploads, pool.hits, pool.reads) == (3, 0, 0)
    pool.drop(a.digest)
    assert pool.where(a.digest) == "disk"


def test_one_that_made_room_is_read_again_for_who_asks_for_it(loaded, config, tmp_path):
    paths = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        paths.append(FORMS[0].write(random_pairs(config, seed=seed), tmp_path / str(seed)))
    pool = AdapterPool(loaded.dit, max_bytes=0, max_host_bytes=0)
    first, second = (AdapterUse(str(n), pool.load(path).digest) for n, path in enumerate(paths))
    assert [pool.where(use.digest) for use in (first, second)] == ["disk", "device"]
    both = pool.find([first, second])
    assert {adapter.digest for adapter, _ in both.uses} == {first.digest, second.digest}
    del both
    pool.find([second])
    assert len(pool.on_device) == len(pool.on_host) == 1
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(AdapterError, match="adapter 0: its file is gone or another since it was"):
        pool.find([first])
    pool.release()
    assert len(pool.on_device) == 0
    assert [adapter.digest for adapter, _ in pool.find([second]).uses] == [second.digest]


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (["x"], "adapters: must be a frozenset of AdapterUse"),
        (frozenset({"x"}), "adapters: must be a frozenset of AdapterUse"),
        (frozenset(AdapterUse(n, n) for n in "abcde"), "adapters: must be at most 4, got 5"),
        (
            frozenset({AdapterUse("x", "x", float("inf"))}),
            "adapters: the scale of x must be a finite number, got inf",
        ),
    ],
)
def test_a_request_for_what_cannot_be_is_refused(adapters, message):
    with pytest.raises(RequestError) as caught:
        ImageRequest(PROMPT, 64, 64, 1, adapters=adapters).check(RequestLimits())
    assert str(caught.value) == message


def test_a_released_image_holds_no_adapter(loaded, adapters, monkeypatch):
    pool = AdapterPool(loaded.dit)
    pool.add(adapters["a"])
    monkeypatch.setattr(loaded, "adapters", pool)
    use = AdapterUse("a", adapters["a"].digest)
    image = ImageRequest(PROMPT, 48, 48, 1, adapters=frozenset({use}))
    (state,) = loaded.encode_sequences([lone_sequence(image)])
    adapter = ref(state.adapters.uses[0][0])
    pool.drop(use.digest)
    assert adapter() is not None
    state.release()
    gc.collect()
    assert adapter() is None


def test_packs_with_adapters_do_without_the_fused_product(loaded, uses, monkeypatch):
    images = mixed(uses)
    (expected,) = latents(loaded, images)
    fused = replace(loaded.dit.operations, fused_mlp_tokens=1)
    monkeypatch.setattr(loaded.dit, "operations", fused)
    (found,) = latents(loaded, images)
    for image, got, other in zip(images, found, expected, strict=True):
        assert relative_error(got, other) <= BOUND, image


def test_contexts_of_the_base_model_are_not_taken_for_an_adapters(loaded, uses):
    image = ImageRequest(PROMPT, 48, 48, 1, adapters=uses(blocks=1.0))
    with pytest.raises(ValueError, match="`encode_sequences` takes them"):
        loaded.start(image, loaded.encode(image.prompts))
