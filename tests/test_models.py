"""The models against oracles: torch's attention, a loop written from the formula, torchvision's
ViT."""

import math
import sys

import pytest
import torch
import torchvision
from torch import nn

import common
import mini_vit
import mini_vit_augment
import mini_vit_concat
import mini_vit_crossattn

MODELS = {
    "mini_vit": (mini_vit.ViT, mini_vit.FULL, mini_vit.SMALL, 118_148_810),
    "concat": (mini_vit_concat.ConcatViT, mini_vit_concat.FULL, mini_vit_concat.SMALL,
               492_622_490),
    "augment": (mini_vit.ViT, mini_vit_augment.FULL, mini_vit_augment.SMALL, 118_148_810),
    "cross": (mini_vit_crossattn.CrossViT, mini_vit_crossattn.FULL, mini_vit_crossattn.SMALL,
              265_841_866),
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def build(name: str, flat: bool) -> nn.Module:
    """The script's model: small on patches, or flat and as wide as in full size, of two layers."""
    model, full, small, _ = MODELS[name]
    return model(**({**full.sizes(), "layers": 2} if flat else small.sizes()))


@torch.no_grad()
def change_vectors(model: nn.Module) -> None:
    """All biases and norms, which are alike at first: one in another's place would not be seen."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


every_model = pytest.mark.parametrize("name, flat", [
    (name, flat) for name in MODELS if name != "augment" for flat in (True, False)])
both_kinds = pytest.mark.parametrize("kind, shape, context_shape", [
    (common.FeatureAttention, (4, 56), (4, 56)), (common.Attention, (4, 9, 56), (4, 6, 56))])
self_and_cross = pytest.mark.parametrize("cross", [False, True])


@self_and_cross
def test_attention_over_tokens_is_torchs(cross: bool) -> None:
    ours = common.Attention(24, 3, qkv_bias=True)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    three = ours.query, ours.key, ours.value
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([linear.weight for linear in three]))
        theirs.in_proj_bias.copy_(torch.cat([linear.bias for linear in three]))
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x = torch.randn(5, 7, 24, requires_grad=True)
    context = torch.randn(5, 4, 24, requires_grad=True) if cross else x
    out, expected = ours(x, context), theirs(x, context, context, need_weights=False)[0]
    torch.testing.assert_close(out, expected)

    ahead = torch.randn_like(out)
    inputs = [x, context] if cross else [x]
    weights = [linear.weight for linear in three]
    our_grads = torch.autograd.grad(out, [*inputs, *weights], ahead)
    their_grads = torch.autograd.grad(expected, [*inputs, theirs.in_proj_weight], ahead)
    torch.testing.assert_close(torch.cat(our_grads[-3:]), their_grads[-1])
    torch.testing.assert_close(our_grads[:-3], their_grads[:-1])


@self_and_cross
def test_attention_over_features_is_the_formula(cross: bool) -> None:
    attention, heads, width = common.FeatureAttention(12, 3), 3, 4
    x = torch.randn(2, 12)
    context = torch.randn(2, 12) if cross else x
    with torch.no_grad():
        query, key, value = attention.query(x), attention.key(context), attention.value(context)
    out = torch.zeros(2, 12)
    for b in range(2):
        for head in range(heads):
            first = head * width
            for i in range(first, first + width):
                scores = [math.exp(query[b, i] * key[b, j]) for j in range(first, first + width)]
                for j in range(first, first + width):
                    out[b, i] += scores[j - first] / sum(scores) * value[b, j]
    torch.testing.assert_close(attention(x, context), attention.proj(out))


@both_kinds
@self_and_cross
def test_attention_is_its_weights_times_its_values(kind: type, shape: tuple, context_shape: tuple,
                                                   cross: bool) -> None:
    attention, x = kind(56, 4), torch.randn(shape, requires_grad=True)
    context = torch.randn(context_shape, requires_grad=True) if cross else x
    out, weights = attention(x, context), attention.weights(x, context)
    heads = weights @ attention.split(attention.value(context))  # (B, H, d, 1) or (B, H, N, d)
    joined = heads.flatten(1) if kind is common.FeatureAttention else heads.transpose(1, 2)
    written = attention.proj(joined.reshape(shape))
    torch.testing.assert_close(out, written)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    ahead, parameters = torch.randn_like(out), {x, context, *attention.parameters()}
    torch.testing.assert_close(torch.autograd.grad(out, parameters, ahead),
                               torch.autograd.grad(written, parameters, ahead))


@both_kinds
@self_and_cross
def test_attention_that_is_compiled_is_the_same(kind: type, shape: tuple, context_shape: tuple,
                                                cross: bool) -> None:
    """On flat images it is other code. Traced as by a compiler, but run as it is, which needs no
    compiler."""
    traced = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> object:
        traced.append(graph.code)
        return graph.forward

    attention, x = kind(56, 4), torch.randn(shape, requires_grad=True)
    context = torch.randn(context_shape) if cross else x
    out, compiled = attention(x, context), torch.compile(attention, backend=keep)(x, context)
    assert ["scaled_dot_product" in code for code in traced] == [kind is common.Attention]
    torch.testing.assert_close(compiled, out)
    ahead, parameters = torch.randn_like(out), [x, *attention.parameters()]
    torch.testing.assert_close(torch.autograd.grad(compiled, parameters, ahead),
                               torch.autograd.grad(out, parameters, ahead))


@pytest.mark.parametrize("name, flat", [("mini_vit", True), ("mini_vit", False),
                                        ("concat", False), ("cross", False)])
def test_a_model_that_is_compiled_is_the_same(name: str, flat: bool) -> None:
    """All of it in one graph, with one region for all blocks of a kind. (Where images need no
    gradient, a flat model's first block has a region of its own.)"""
    regions = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> object:
        regions.append(len([name for name, _ in graph.named_children() if "subgraph" in name]))
        return graph.forward

    model, full, small, _ = MODELS[name]
    sizes = {"layers": 2, "dropout": 0.0, "input_dropout": 0.0}
    model = model(**{**(full if flat else small).sizes(), **sizes})
    images = torch.randn(3, 1, 28, 28, requires_grad=True)
    out, compiled = model(images), torch.compile(model, backend=keep)(images)
    assert regions == [2 if name == "cross" else 1]
    torch.testing.assert_close(compiled, out)
    ahead, parameters = torch.randn_like(out), [images, *model.parameters()]
    for one, other in zip(torch.autograd.grad(compiled, parameters, ahead),
                          torch.autograd.grad(out, parameters, ahead), strict=True):
        close(one, other)


@pytest.mark.parametrize("compile", [False, True])
def test_a_model_is_compiled_only_if_asked_for(compile: bool,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, recipe = [], common.replace(mini_vit.SMALL, device="cpu", compile=compile)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append(self))
    model = build("mini_vit", flat=False)
    assert common.make_ready(model, recipe) is model
    assert compiled == [model] * compile


@pytest.mark.parametrize("device, options, compile", [
    ("cuda:0", "", True), ("cuda:0", "--small", False), ("cuda:0", "--small --compile", True),
    ("cuda:0", "--no-compile", False), ("cpu", "", False), ("cpu", "--compile", True)])
def test_full_size_is_compiled_on_a_gpu(device: str, options: str, compile: bool,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "choose_device", lambda name: device)
    monkeypatch.setattr(common.shutil, "which", lambda name: "/usr/bin/cc")
    monkeypatch.setattr(sys, "argv", ["mini_vit.py", *options.split()])
    assert common.read_options("", mini_vit.FULL, mini_vit.SMALL).compile == compile
    monkeypatch.setattr(common.shutil, "which", lambda name: None)
    assert common.read_options("", mini_vit.FULL, mini_vit.SMALL).compile == (
        "--compile" in options)


def test_vit_b_16_is_torchvisions() -> None:
    """All of its layers, on images of 64 x 64 pixels, which have fewer places."""
    sizes = dict(layers=12, heads=12, dim=768, patch_size=16, channels=3, classes=1000)
    with torch.device("meta"):
        assert count(mini_vit.ViT(**sizes, image_size=224)) == 86_567_656
        ours = mini_vit.ViT(**sizes, image_size=64)
    theirs = torchvision.models.vit_b_16(weights=None, image_size=64).eval()
    nn.init.normal_(theirs.heads.head.weight, std=0.02)  # from 0, it would agree with anything
    nn.init.normal_(theirs.class_token)
    change_vectors(theirs)
    weights = theirs.state_dict()
    copied = {"embed.linear.weight": weights["conv_proj.weight"].flatten(1),
              "embed.linear.bias": weights["conv_proj.bias"],
              "embed.class_token": weights["class_token"],
              "embed.positions": weights["encoder.pos_embedding"]}
    same = {"attention.proj": "self_attention.out_proj", "norm1": "ln_1", "norm2": "ln_2",
            "mlp.0": "mlp.0", "mlp.2": "mlp.3"}
    for part in ("weight", "bias"):
        copied[f"head.norm.{part}"] = weights[f"encoder.ln.{part}"]
        copied[f"head.linear.{part}"] = weights[f"heads.head.{part}"]
        for i in range(12):
            block, layer = f"blocks.{i}", f"encoder.layers.encoder_layer_{i}"
            three = weights[f"{layer}.self_attention.in_proj_{part}"].chunk(3)
            for name, third in zip(("query", "key", "value"), three):
                copied[f"{block}.attention.{name}.{part}"] = third
            for mine, name in same.items():
                copied[f"{block}.{mine}.{part}"] = weights[f"{layer}.{name}.{part}"]
    ours.load_state_dict(copied, assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 0.1
        assert (ours.eval()(images) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: str) -> None:
    model, full, small, parameters = MODELS[name]
    with torch.device("meta"):
        assert count(model(**full.sizes())) == parameters
        assert count(model(**small.sizes())) <= parameters / 100
    assert full.patch_size == 28 and small.patch_size < 28


@every_model
def test_every_parameter_gets_a_gradient(name: str, flat: bool) -> None:
    model = build(name, flat)
    nn.functional.cross_entropy(model(torch.randn(6, 1, 28, 28)), torch.arange(6)).backward()
    without = [name for name, parameter in model.named_parameters()
               if not parameter.grad.abs().sum() > 0]
    # The keys' bias adds the same to all scores of a query, and softmax does not see that.
    assert [name for name in without if not name.endswith("key.bias")] == []


@every_model
def test_images_of_a_batch_do_not_influence_each_other(name: str, flat: bool) -> None:
    model, images = build(name, flat).eval(), torch.randn(7, 1, 28, 28)
    with torch.no_grad():
        logits = model(images)
        order = torch.randperm(7)
        close(model(images[order]), logits[order])
        close(model(images[:1]), logits[:1])
        other = images.clone()
        other[3] = 0
        changed = model(other)
        assert (changed[3] - logits[3]).abs().max() > 1e-3
        close(changed[4:], logits[4:])


@every_model
def test_a_model_has_its_dropout_in_each_half_of_a_block_and_its_input_dropout(
        name: str, flat: bool) -> None:
    model, full, small, _ = MODELS[name]
    recipe = common.replace(full if flat else small, layers=1, dropout=0.6, input_dropout=0.25)
    model, images, same = model(**recipe.sizes()), torch.ones(20, 1, 28, 28), []

    def look(block: nn.Module, inputs: tuple, out: torch.Tensor) -> None:
        same.append((out == inputs[0]).double().mean().item())

    for block in (module for module in model.modules() if isinstance(module, common.Block)):
        block.register_forward_hook(look)
    model(images)
    assert same and same == pytest.approx([0.6**2] * len(same), abs=0.05)  # both halves add 0
    embedded = model.embed(images)
    if flat:
        assert (embedded == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)
    else:
        assert embedded.shape[1] == 1 + 37  # of 1 + 49


def test_each_block_of_concat_and_its_head_see_the_image_beside_the_stream() -> None:
    model, images = build("concat", flat=False).eval(), torch.randn(2, 1, 28, 28)
    seen, stream = [], []
    for module in [*model.blocks, model.head]:
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for module in [model.first, *model.narrow]:
        module.register_forward_hook(lambda module, inputs, out: stream.append(out))
    model(images)
    for both, h in zip(seen, stream, strict=True):
        torch.testing.assert_close(both, torch.cat([model.embed(images), h], dim=-1))


def test_each_layer_of_crossattn_asks_its_encoder_of_the_image() -> None:
    model, images = build("cross", flat=False).eval(), torch.randn(2, 1, 28, 28)
    change_vectors(model)
    x = image = model.embed(images)
    for layer in model.layers:
        x, context, cross = layer.block(x), layer.encoder(image), layer.cross
        # queries from the stream; keys and values from the encoder
        x = x + cross.attention(cross.norm1(x), cross.norm_context(context))
        x = x + cross.mlp(cross.norm2(x))
    torch.testing.assert_close(model(images), model.head(x))


def test_the_order_of_patches_matters_because_of_positions() -> None:
    model = mini_vit.ViT(layers=2, heads=4, dim=64, patch_size=7).eval()
    images = torch.randn(2, 1, 28, 28)
    turned = images.roll(7, dims=-1)  # the same patches in other places
    assert (model(images) - model(turned)).abs().max() > 1e-3
    nn.init.zeros_(model.embed.positions)
    close(model(images), model(turned))


def bare_embedding(dim: int, overlap: int) -> mini_vit.PatchEmbedding:
    """Its tokens are the patches, of 4 x 4 pixels, as they are."""
    embed = mini_vit.PatchEmbedding(dim, 4, image_size=8, channels=1, overlap=overlap)
    nn.init.eye_(embed.linear.weight)
    nn.init.zeros_(embed.linear.bias)
    nn.init.zeros_(embed.positions)
    return embed


def test_patches_are_the_squares_of_the_image() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    tokens = bare_embedding(16, overlap=0)(image)[0]  # number 0 is the class token
    torch.testing.assert_close(tokens[2], image[0, 0, :4, 4:].flatten())


def test_overlapping_patches_reach_into_their_neighbours_and_past_the_edge() -> None:
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    tokens = bare_embedding(36, overlap=1)(image)[0]
    edge = nn.functional.pad(image, (1, 1, 1, 1))[0, 0]  # (10, 10)
    for number, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)], start=1):
        patch = edge[top : top + 6, left : left + 6]
        torch.testing.assert_close(tokens[number], patch.flatten())


def test_training_leaves_out_patches_of_each_images_own_choice() -> None:
    embed = mini_vit.PatchEmbedding(32, 7, image_size=28, channels=1, dropout=0.3)
    images = torch.randn(200, 1, 28, 28)
    some, whole = embed(images), embed.eval()(images)
    assert some.shape == (200, 1 + 11, 32)  # 0.7 * 16 is about 11
    assert whole.shape == (200, 1 + 16, 32)
    same = (some.unsqueeze(2) - whole.unsqueeze(1)).abs().amax(dim=3) < 1e-6  # (200, 12, 17)
    assert (same.sum(dim=2) == 1).all()  # each token is one of the whole image's, with its place
    assert same[:, 0, 0].all()  # the class token first
    kept = same.sum(dim=1)  # (200, 17)
    assert kept.max() == 1 and len(kept.unique(dim=0)) > 150
    shares = kept[:, 1:].float().mean(dim=0)
    assert ((shares - 11 / 16).abs() < 0.15).all()  # 4.5 standard deviations


@pytest.mark.parametrize("name", MODELS)
def test_every_script_has_overlap(name: str) -> None:
    model, _, small, _ = MODELS[name]
    embed = model(**{**small.sizes(), "overlap": 2}).embed
    assert embed.linear.in_features == (small.patch_size + 2 * 2) ** 2


@every_model
def test_every_model_overfits_64_digits(name: str, flat: bool) -> None:
    """Of two layers, and without dropout: that takes 4 steps flat, and 24 on patches."""
    model, full, small, _ = MODELS[name]
    recipe = common.replace(full if flat else small, layers=2, dropout=0.0, input_dropout=0.0,
                            overlap=0, patch_size=28 if flat else 7, lr=3e-4 if flat else 3e-3,
                            muon=False)
    _, images, labels = common.draw_digits(64, seed=0)
    model, images = model(**recipe.sizes()), common.normalise(images)
    optimizers = common.make_optimizers(model, recipe)
    for step in range(1, 101):
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 4 == 0:
            with torch.no_grad():
                right = (model(images).argmax(1) == labels).sum()
            if right == 64:
                return
    pytest.fail(f"{right} of 64 digits after {step} steps")


@pytest.mark.parametrize("wrong, word", [
    ({"heads": 5}, "heads"), ({"patch_size": 5}, "patch"), ({"patch_size": 28}, "784"),
    ({"patch_size": 28, "dim": 784, "overlap": 2}, "overlap")])
def test_sizes_that_do_not_fit_are_told(wrong: dict, word: str) -> None:
    with pytest.raises(common.Problem, match=word):
        mini_vit.ViT(**{"layers": 1, "heads": 4, "dim": 64, "patch_size": 7, **wrong})
