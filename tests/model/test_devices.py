"""Megatron-core's CUDA calls on a machine without a GPU."""

import pytest
import torch

import m1.model  # noqa: F401  (maps the calls)
from m1.model import devices

pytestmark = pytest.mark.skipif(devices.has_gpu(), reason="a GPU is there, nothing is mapped")


def test_gpu_calls_land_on_the_cpu():
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.cuda.device_count() == 1
    assert devices.backend() == "gloo"
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        event = torch.cuda.Event()
        event.record(stream)
        stream.wait_event(event)
    assert event.query() and stream.query()
    assert torch.cuda.memory_allocated() == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0, torch.device("cuda"), torch.device("cuda", 3)], ids=str)
def test_factories_and_moves_accept_every_name_of_a_gpu(device):
    assert torch.zeros(2, device=device).device.type == "cpu"
    assert torch.tensor([1.0], device=device).device.type == "cpu"
    assert torch.arange(3, device=device, dtype=torch.float32).tolist() == [0, 1, 2]
    assert torch.empty(2, device=device, pin_memory=True).device.type == "cpu"
    x = torch.ones(2)
    assert x.to(device=device).device.type == "cpu"
    assert x.cuda(device) is x
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_moves_by_name_and_dtype():
    x = torch.ones(2)
    assert x.to("cuda", torch.bfloat16).dtype == torch.bfloat16
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64


def test_meta_tensors_still_work():
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 4)
        made = torch.zeros(3)
    assert layer.weight.is_meta and made.is_meta
    assert torch.empty(2, device="meta").is_meta
    assert torch.zeros(2).device.type == "cpu"


def test_type_strings_are_those_of_a_gpu():
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type("torch.cuda.DoubleTensor").dtype == torch.float64
    assert torch.ones(1).bfloat16().type() == "torch.cuda.BFloat16Tensor"


def test_random_state_is_saved_and_restored():
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed(5)
    seeded = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), seeded)


def test_there_are_no_device_properties():
    with pytest.raises(AssertionError):
        torch.cuda.get_device_properties(0)


def test_compiling_is_as_before():
    """Megatron's decorators are left uncompiled; torch.compile itself is untouched afterwards."""
    assert torch.compile.__module__ == "torch"
