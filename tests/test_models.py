"""The models against torch's attention, a loop written from the formula, and torchvision's ViT."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import TINY, read_options
from pytest import MonkeyPatch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager  # runs without a C++ compiler

import common
import mini_vit
import mini_vit_augment
import mini_vit_concat
import mini_vit_crossattn

MODELS = {
    "mini_vit": (mini_vit, mini_vit.ViT, 118_148_810),
    "concat": (mini_vit_concat, mini_vit_concat.ConcatViT, 492_622_490),
    "augment": (mini_vit_augment, mini_vit.ViT, 118_148_810),
    "crossattn": (mini_vit_crossattn, mini_vit_crossattn.CrossViT, 265_841_866),
}

def build(name: str, flat: bool, **changes: object) -> nn.Module:
    """The script's model: small on patches, or flat and as wide as in full size; of two layers."""
    script, model, _ = MODELS[name]
    options = read_options(f"--device cpu {'--no-small' if flat else '--small'}", script)
    return model(**{**common.model_options(options), "layers": 2, **changes})

def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

def blocks_of(model: nn.Module) -> list[common.Block]:
    return [module for module in model.modules() if isinstance(module, common.Block)]

@torch.no_grad()
def change_vectors(model: nn.Module) -> None:
    """All biases and norms, which start with equal values: a mix-up of two would go unnoticed."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))

def close(one: Tensor | tuple, other: Tensor | tuple, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)

def same_with_gradients(one: Tensor, other: Tensor, inputs: list[Tensor]) -> None:
    ahead = torch.randn_like(one)
    close(one, other)
    close(torch.autograd.grad(one, inputs, ahead, retain_graph=True),
          torch.autograd.grad(other, inputs, ahead, retain_graph=True))

every_model = pytest.mark.parametrize("name, flat", [
    (name, flat) for name in MODELS if name != "augment" for flat in (True, False)])
self_and_cross = pytest.mark.parametrize("cross", [False, True])

@self_and_cross
def test_attention_over_tokens_is_torchs(cross: bool) -> None:
    ours = common.Attention(24, 3, qkv_bias=True)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    three = ours.query, ours.key, ours.value
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([linear.weight for linear in three]))
        theirs.in_proj_bias.copy_(torch.cat([linear.bias for linear in three]))
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(5, 7, 24, requires_grad=True)
    context = torch.randn(5, 4, 24, requires_grad=True) if cross else x
    out, expected = ours(x, context), theirs(x, context, context, need_weights=False)[0]
    torch.testing.assert_close(out, expected)
    ahead, inputs = torch.randn_like(out), {x, context}
    weights = [linear.weight for linear in three]
    our_grads = torch.autograd.grad(out, [*weights, *inputs], ahead)
    their_grads = torch.autograd.grad(expected, [theirs.in_proj_weight, *inputs], ahead)
    torch.testing.assert_close((torch.cat(our_grads[:3]), *our_grads[3:]), their_grads)

@self_and_cross
def test_attention_over_features_is_the_formula(cross: bool) -> None:
    attention, x = common.FeatureAttention(12, heads=3), torch.randn(2, 12)
    context, out = torch.randn(2, 12) if cross else x, torch.zeros(2, 12)
    with torch.no_grad():
        query, key, value = attention.query(x), attention.key(context), attention.value(context)
    for b in range(2):
        for i in range(12):
            head = range(i // 4 * 4, i // 4 * 4 + 4)  # the features of the same head
            scores = [math.exp(query[b, i] * key[b, j]) for j in head]
            for score, j in zip(scores, head):
                out[b, i] += score / sum(scores) * value[b, j]
    torch.testing.assert_close(attention(x, context), attention.proj(out))

def compile_and_keep(module: nn.Module) -> tuple[Callable, list]:
    graphs = []
    compile_one = lambda graph, inputs: (graphs.append(graph), aot_eager(graph, inputs))[1]
    return torch.compile(module, backend=compile_one), graphs

@pytest.mark.parametrize("kind, shape, context_shape", [
    (common.FeatureAttention, (4, 56), (4, 56)), (common.Attention, (4, 9, 56), (4, 6, 56))])
@self_and_cross
def test_attention_is_its_weights_times_its_values(kind: type, shape: tuple, context_shape: tuple,
                                                   cross: bool) -> None:
    attention, x = kind(56, 4), torch.randn(shape, requires_grad=True)
    context = torch.randn(context_shape, requires_grad=True) if cross else x
    weights = attention.weights(x, context)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    heads = weights @ attention.split(attention.value(context))  # (B, H, d, 1) or (B, H, N, d)
    joined = heads.flatten(1) if kind is common.FeatureAttention else heads.transpose(1, 2)
    expected = attention.proj(joined.reshape(shape))
    compiled, graphs = compile_and_keep(attention)
    for out in attention(x, context), compiled(x, context):
        same_with_gradients(out, expected, [*{x, context}, *attention.parameters()])
    graph, = graphs
    assert ("scaled_dot_product" in graph.code) == (kind is common.Attention)

@pytest.mark.parametrize("name, flat", [("mini_vit", True), ("mini_vit", False),
                                        ("concat", False), ("crossattn", False)])
def test_a_compiled_model_is_the_same(name: str, flat: bool) -> None:
    """It is one graph with a region for each kind of block; on patches, with one more for the last
    of its kind, which computes a single token. (Without a gradient for the images, the first block
    of a flat model may be compiled separately.)"""
    model = build(name, flat, layers=3, dropout=0.0, input_dropout=0.0)
    images = torch.randn(3, 1, 28, 28, requires_grad=True)
    compiled, graphs = compile_and_keep(model)
    same_with_gradients(compiled(images), model(images), [images, *model.parameters()])
    graph, = graphs
    regions = [name for name, _ in graph.named_children() if "subgraph" in name]
    kinds = {type(block) for block in blocks_of(model)}
    assert len(regions) == (len(kinds) if flat else 2 * len(kinds))

@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_compiled_only_if_asked_for(name: str, few_digits: None, command_line: Callable,
                                               monkeypatch: MonkeyPatch) -> None:
    compiled, (script, model, _) = [], MODELS[name]
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self)))
    for option, expected in ("--no-compile", []), ("--compile", [model]):
        code, _, err = command_line(script, f"{TINY} --epochs 0 {option}")
        assert (code, compiled) == (0, expected), err

@pytest.mark.parametrize("gpu, options, small, compiled", [
    ("cuda", "", False, True), ("mps", "", True, False), (None, "", True, False),
    ("cuda", "--small", True, False), ("cuda", "--small --compile", True, True),
    ("cuda", "--no-compile", False, False), ("cuda", "--device cpu", True, False),
    (None, "--no-small", False, False), (None, "--no-small --compile", False, True)])
def test_a_cuda_gpu_trains_and_compiles_full_size_and_others_the_small_model(
        gpu: str | None, options: str, small: bool, compiled: bool,
        monkeypatch: MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator",
                        lambda check_available: gpu and torch.device(gpu))
    monkeypatch.setattr(common, "working_device", torch.device)
    (tmp_path / "Python.h").touch()
    others = dict(overlap=0, dropout=0, input_dropout=0, muon=False, adversarial=0, tta=0)
    for script, _, _ in MODELS.values():
        expected = {**others, **(script.SMALL if small else script.FULL), "small": small}
        for compiler, headers in ((None, tmp_path), ("cc", tmp_path), ("cc", tmp_path / "no")):
            monkeypatch.setattr(common.shutil, "which", lambda name: compiler)
            monkeypatch.setattr(common.sysconfig, "get_path", lambda name: headers)
            read = vars(read_options(options, script))
            assert {name: read[name] for name in expected} == expected
            works = compiler is not None and headers == tmp_path
            assert read["compile"] == (compiled and works or "--compile" in options)
            assert read["device"].type == ("cpu" if "cpu" in options else gpu or "cpu")

def test_vit_b_16_is_torchvisions() -> None:
    """All of its layers, on images of 64 x 64 pixels, which have fewer positions."""
    sizes = dict(layers=12, heads=12, dim=768, patch_size=16, channels=3, classes=1000)
    with torch.device("meta"):
        assert count(mini_vit.ViT(**sizes, image_size=224)) == 86_567_656
        ours = mini_vit.ViT(**sizes, image_size=64)
    theirs = torchvision.models.vit_b_16(weights=None, image_size=64).eval()
    nn.init.normal_(theirs.heads.head.weight, std=0.02)  # it is 0, and so would be all logits
    nn.init.normal_(theirs.class_token)
    change_vectors(theirs)
    names = {"class_token": "embed.class_token", "conv_proj": "embed.linear",
             "encoder.pos_embedding": "embed.positions", "encoder.layers.encoder_layer_": "blocks.",
             "self_attention.out_proj": "attention.proj", "ln_1": "norm1", "ln_2": "norm2",
             "mlp.3": "mlp.2", "encoder.ln": "head.norm", "heads.head": "head.linear"}
    weights = {}
    for name, weight in theirs.state_dict().items():
        for their_part, our_part in names.items():
            name = name.replace(their_part, our_part)
        if "in_proj" in name:
            for part, third in zip(("query", "key", "value"), weight.chunk(3)):
                weights[name.replace("self_attention.in_proj_", f"attention.{part}.")] = third
        else:
            weights[name] = weight
    weights["embed.linear.weight"] = weights["embed.linear.weight"].flatten(1)
    ours.load_state_dict(weights, assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 0.1
        assert (ours.eval()(images) - expected).abs().max() < 1e-4

@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_and_patches_that_overlap(name: str) -> None:
    script, _, parameters = MODELS[name]
    with torch.device("meta"):
        assert count(build(name, flat=True, layers=script.FULL["layers"])) == parameters
        small = count(build(name, flat=False, layers=script.SMALL["layers"]))
        overlapping = build(name, flat=False, overlap=2)
    assert small <= parameters / 100
    assert overlapping.embed.linear.in_features == (script.SMALL["patch_size"] + 2 * 2) ** 2

@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_on_patches_loses_nothing_when_it_computes_the_class_token_alone(
        name: str, layers: int) -> None:
    with torch.device("meta"):
        assert not any(block.class_token_only for block in blocks_of(build(name, flat=True)))
    model = build(name, flat=False, layers=layers, patch_size=7, dropout=0.0, input_dropout=0.0)
    change_vectors(model)
    last = model.layers[-1].block if name == "crossattn" else model.blocks[-1]
    assert [block for block in blocks_of(model) if block.class_token_only] == [last]
    images, results, tokens = torch.randn(6, 1, 28, 28), [], []
    last.mlp.register_forward_hook(lambda module, inputs, out: tokens.append(out.shape[1]))
    for only in (True, False):
        last.class_token_only = only
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, torch.arange(6))
        results.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    assert tokens == [1, 17]
    for one, other in zip(*results, strict=True):
        close(one, other, tolerance=1e-5)

@every_model
def test_images_of_a_batch_do_not_influence_each_other(name: str, flat: bool) -> None:
    model, images = build(name, flat).eval(), torch.randn(7, 1, 28, 28)
    with torch.no_grad():
        logits = model(images)
        order = torch.randperm(7)
        close(model(images[order]), logits[order])
        close(model(images[:1]), logits[:1])
        changed = model(images.index_fill(0, torch.tensor(3), 0.0))
        assert (changed[3] - logits[3]).abs().max() > 1e-3
        close(changed[4:], logits[4:])

@every_model
def test_dropout_is_in_both_halves_of_a_block_and_input_dropout_in_the_embedding(
        name: str, flat: bool) -> None:
    model = build(name, flat, layers=1, dropout=0.6, input_dropout=0.25)
    images, same = torch.ones(60, 1, 28, 28), []

    def compare(block: nn.Module, inputs: tuple, out: Tensor) -> None:  # out may be a single token
        same.append((out == inputs[0][:, : out.shape[1]]).double().mean().item())

    for block in blocks_of(model):
        block.register_forward_hook(compare)
    model(images)
    assert same and same == pytest.approx([0.6**2] * len(same), abs=0.05)  # both halves add 0
    some, whole = model.embed(images), model.eval().embed(images)
    kept = (some.count_nonzero() / whole.count_nonzero() if flat
            else (some.shape[1] - 1) / (whole.shape[1] - 1))
    assert kept == pytest.approx(0.75, abs=0.05)

def test_each_block_of_concat_and_its_head_get_the_image_beside_the_hidden_state() -> None:
    model, images = build("concat", flat=False).eval(), torch.randn(2, 1, 28, 28)
    inputs, hidden = [], []
    for module in [*model.blocks, model.head]:
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for module in [model.linear, *model.narrow]:
        module.register_forward_hook(lambda module, args, out: hidden.append(out))
    model(images)
    image = model.embed(images)
    for both, h in zip(inputs, hidden, strict=True):
        torch.testing.assert_close(both, torch.cat([image[:, : h.shape[1]], h], dim=-1))

def test_each_layer_of_crossattn_attends_to_its_own_encoding_of_the_image() -> None:
    model, images = build("crossattn", flat=False).eval(), torch.randn(2, 1, 28, 28)
    change_vectors(model)
    x = image = model.embed(images)
    for layer in model.layers:
        x, context, cross = layer.block(x), layer.encoder(image), layer.cross
        # queries from the hidden state; keys and values from the encoder
        x = x + cross.attention(cross.norm1(x), cross.norm_context(context))
        x = x + cross.mlp(cross.norm2(x))
    torch.testing.assert_close(model(images), model.head(x))

def test_patches_that_overlap_are_a_convolution() -> None:
    embed = mini_vit.PatchEmbedding(8, 4, image_size=12, channels=2, overlap=1)
    images, kernels = torch.randn(3, 2, 12, 12), embed.linear.weight.view(8, 2, 6, 6)
    patches = nn.functional.conv2d(images, kernels, embed.linear.bias, stride=4, padding=1)
    close(embed(images)[:, 1:], patches.flatten(2).mT + embed.positions[:, 1:])

def test_training_drops_patches_of_each_image_at_random() -> None:
    embed = mini_vit.PatchEmbedding(32, 7, image_size=28, channels=1, dropout=0.3)
    images = torch.randn(200, 1, 28, 28)
    some, whole = embed(images), embed.eval()(images)
    assert some.shape[1] == 1 + 11 and whole.shape[1] == 1 + 16  # 0.7 * 16 is about 11
    same = (some.unsqueeze(2) - whole.unsqueeze(1)).abs().amax(dim=3) < 1e-6  # (200, 12, 17)
    assert (same.sum(dim=2) == 1).all()  # each is one of the whole image's, with its position
    assert same[:, 0, 0].all()  # the class token first
    kept = same.sum(dim=1)  # (200, 17)
    assert kept.max() == 1 and len(kept.unique(dim=0)) > 150
    shares = kept[:, 1:].float().mean(dim=0)
    assert ((shares - 11 / 16).abs() < 0.15).all()  # 4.5 standard deviations

@every_model
def test_every_parameter_gets_a_gradient_and_64_digits_are_memorized(
        name: str, flat: bool) -> None:
    """Without dropout that takes a flat layer 3 to 5 steps, and two on patches about 24."""
    sizes = {"layers": 1} if flat else {"patch_size": 7, "overlap": 0}
    model = build(name, flat, dropout=0.0, input_dropout=0.0, **sizes)
    _, images, labels = common.draw_digits(64, seed=0)
    lr, options = torch.tensor(3e-4 if flat else 3e-3), read_options("--device cpu --no-muon")
    optimizers = common.make_optimizers(model, lr, options)
    for _ in range(100):
        logits = model(common.normalize(images))
        if (logits.argmax(dim=1) == labels).all():
            return
        nn.functional.cross_entropy(logits, labels).backward()
        without = [name for name, weight in model.named_parameters() if not weight.grad.any()]
        # The keys' bias adds the same to all scores of a query, which softmax cancels.
        assert [name for name in without if not name.endswith("key.bias")] == []
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pytest.fail(f"{(logits.argmax(dim=1) == labels).sum()} of 64 digits after 100 steps")
