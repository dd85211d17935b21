"""The line that says what a figure was measured on."""

import os
from datetime import date

import torch

from modicum.report.machine import machine, processor


def test_names_what_decides_a_time():
    line = machine()
    assert line.startswith(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, ")
    assert f"torch {torch.__version__}, {date.today()}, load " in line


def test_a_system_that_hides_its_processor(monkeypatch):
    monkeypatch.setattr("modicum.report.machine.Path.exists", lambda path: False)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "abacus")
    assert processor() == "abacus"
