"""Clients that others have written, against a real server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.http as triton

from benchmarks.server import Server
from reptile.bundle_format import GOLDEN_FILE, GOLDEN_FOLDER, GoldenCase, parse_golden


@pytest.fixture(scope="module")
def server(exported: Path) -> Iterator[Server]:
    with Server(exported) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as opened:
        yield opened


def golden_cases(bundle: Path) -> list[GoldenCase]:
    """The cases of models that are served."""
    index = (bundle / GOLDEN_FOLDER / GOLDEN_FILE).read_bytes()
    return [case for case in parse_golden(index, "golden") if case.graph in ("few_shot", "predict")]


def as_input(name: str, value: npt.NDArray[np.generic], binary: bool) -> triton.InferInput:
    value = np.atleast_1d(value)  # Triton has no scalars
    tensor = triton.InferInput(name, value.shape, triton.np_to_triton_dtype(value.dtype))
    return tensor.set_data_from_numpy(value, binary_data=binary)


def test_triton_sees_a_server_and_its_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("few_shot")
    assert not client.is_model_ready("nothing")
    assert "name" in client.get_server_metadata()
    tensors = client.get_model_metadata("predict")
    assert tensors["inputs"][0]["name"] == "images"


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_triton_gets_the_golden_tensors(
    client: triton.InferenceServerClient, exported: Path, binary: bool
) -> None:
    cases = golden_cases(exported)
    assert {case.graph for case in cases} == {"few_shot", "predict"}
    for case in cases:
        load = {
            name: np.load(exported / GOLDEN_FOLDER / file) for name, file in case.inputs.items()
        }
        if any(value.size == 0 for value in load.values()):
            continue  # zero steps: this client sends no empty tensors
        inputs = [as_input(name, value, binary) for name, value in load.items()]
        wanted = [triton.InferRequestedOutput("logits", binary_data=binary)]
        answer = client.infer(case.graph, inputs, outputs=wanted)
        expected = np.load(exported / GOLDEN_FOLDER / case.outputs["logits"])
        found = answer.as_numpy("logits")
        np.testing.assert_allclose(found, expected, rtol=case.rtol, atol=case.atol)


def test_triton_is_told_why_a_request_is_refused(client: triton.InferenceServerClient) -> None:
    wrong = [as_input("images", np.zeros((1, 1, 2, 2), np.float32), True)]
    with pytest.raises(triton.InferenceServerException, match="images"):
        client.infer("predict", wrong)
