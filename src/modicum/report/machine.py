"""What a figure was measured on."""

import os
import platform
from datetime import date
from pathlib import Path

import torch


def machine(device: str = "cpu") -> str:
    """One line: processor or GPU, threads, PyTorch, day, and on a CPU how busy it was at that moment."""
    made = f"torch {torch.__version__}, {date.today()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {made}"
    load = os.getloadavg()[0]
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {made}, load {load:.1f}"


def processor() -> str:
    """The processor's name, by what Linux says of it where `platform` knows none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
