"""Power is the slope of NVML's counter, energy its sum over the logged lines."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fox_training.energy import PowerMeter, watt_hours


def test_watts_are_joules_by_seconds_of_the_gpu_of_this_process(monkeypatch):
    counter = {"GPU-aa": iter([0, 5_000_000, 5_700_000, 6_000_000])}  # millijoules; the first is a trial
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: counter[uuid],
        nvmlDeviceGetTotalEnergyConsumption=next,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aa"))
    clock = iter([10.0, 11.0, 11.5]).__next__
    meter = PowerMeter(torch.device("cuda", 3), clock)
    assert meter.lap() == pytest.approx(700.0)
    assert meter.lap() == pytest.approx(600.0)


def test_without_a_counter_nothing_is_said(monkeypatch):
    assert PowerMeter(torch.device("cpu")).lap() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    assert PowerMeter(torch.device("cuda")).lap() is None


def test_energy_is_power_times_the_time_of_training():
    rows = [{"train_seconds": 3600.0, "gpu_watts": 500.0}, {"train_seconds": 5400.0, "gpu_watts": 700.0}]
    assert watt_hours(rows) == pytest.approx(500 + 350)
    assert watt_hours([*rows, {"train_seconds": 5500.0}]) is None
    assert watt_hours([]) is None
