"""Names, shapes, number formats and values of weight files are told apart, without a model."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpo_ray.tensors import TensorSpec, read_tensors, same_tensors

WEIGHTS = {
    "embed": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "norm": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    "scale": torch.tensor(3.0, dtype=torch.float64),
    "nothing": torch.empty(0, 4),
}


def spec(dtype: str = "F32", *shape: int, sha256: str = "") -> TensorSpec:
    return TensorSpec(shape=list(shape), dtype=dtype, sha256=sha256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(WEIGHTS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_a_tensor_is_its_shape_its_format_and_its_bytes(folder: Path) -> None:
    tensors = read_tensors(folder)
    assert tensors.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert tensors[name].shape == list(tensor.shape)
        assert tensors[name].sha256 == hashlib.sha256(content).hexdigest()
    assert [tensors[name].dtype for name in WEIGHTS] == ["F32", "BF16", "F64", "F32"]


def test_the_parts_of_a_model_are_read_as_one(folder: Path) -> None:
    whole = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        save_file({name: tensor}, folder / f"model-{number:05d}-of-00004.safetensors")
    assert read_tensors(folder) == whole


def test_a_name_in_two_files_is_refused(folder: Path) -> None:
    save_file({"norm": WEIGHTS["norm"]}, folder / "other.safetensors")
    with pytest.raises(ValueError, match=r"tensor norm is in two files of .*: keep one of them"):
        read_tensors(folder)


def test_adapters_in_a_folder_of_their_own_are_not_the_model(folder: Path) -> None:
    (folder / "adapter").mkdir()
    save_file({"lora": torch.ones(2)}, folder / "adapter" / "adapter_model.safetensors")
    assert "lora" not in read_tensors(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"short", "has no header"),
        (bytes(range(256)), "has no header"),
        ((2).to_bytes(8, "little") + b"[]", "has no header"),
        ((4).to_bytes(8, "little") + b'{"a"', "has no header"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "has no header"),
    ],
)
def test_what_is_no_weight_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors {message}"):
        read_tensors(tmp_path)


def test_a_file_that_was_cut_off_is_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off: it lacks values of tensor"):
        read_tensors(folder)


def test_offsets_before_the_first_value_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="lacks values of tensor a"):
        read_tensors(tmp_path)


def test_the_same_layout_with_other_values_is_the_same() -> None:
    same_tensors({"a": spec("F32", 2, sha256="x")}, {"a": spec("F32", 2, sha256="y")})


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        ({"a": spec("F32", 2, 3)}, "tensor b is missing"),
        ({"b": spec("F32", 2)}, "tensor a is missing"),
        ({"a": spec("F32", 3, 2), "b": spec("F32", 2)}, r"tensor a is F32\[3, 2\], and must be F32\[2, 3\]"),
        ({"a": spec("F32", 2, 3), "b": spec("BF16", 2)}, r"tensor b is BF16\[2\], and must be F32\[2\]"),
        ({"a": spec("F32", 2, 3), "b": spec("F32", 2), "c": spec()}, "tensor c is unexpected"),
    ],
)
def test_the_first_tensor_that_differs_is_named(ours: dict[str, TensorSpec], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        same_tensors(ours, {"a": spec("F32", 2, 3), "b": spec("F32", 2)})
