"""What a process used, read from the kernel and from torch's allocator: peak memory, live tensors, bytes sent.

Three counters, because each of the obvious ones lies. `ru_maxrss` is inherited through exec, so a small program that
a large one starts has the large one's peak: we clear the kernel's high-water mark and read it again. Resident memory
depends on what the C library keeps: the peak of live tensors does not. `/proc/net/dev` counts headers,
acknowledgements and every other process of the machine: the kernel's account of a process's own TCP sockets does not.

Linux only. MB are 10^6 bytes.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import socket
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

# Offsets in the kernel's `struct tcp_info` (include/uapi/linux/tcp.h, Linux 4.19 and newer).
_TCP_INFO_SIZE = 232
_TCPI_BYTES_SENT = 200  # followed by tcpi_bytes_retrans


def peak_resident_mb(work: Callable[[], object]) -> float:
    """How far resident memory rises above its present level while `work` runs.

    Meant for a fresh process: pages that an earlier computation left with the allocator would be used again unseen.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what building the inputs freed goes back to the kernel first
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present level
    before = _high_water_kb()
    work()
    return (_high_water_kb() - before) * 1024 / 1e6


def _high_water_kb() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "this kernel's /proc/self/status has no VmHWM"
    return int(found[1])


def resident_mb() -> float:
    """Resident memory of this process and its children; pages that they share count for each."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in ("self", *children):
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:  # it has ended
            continue
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        total += int(found[1]) if found else 0  # one that has ended and is not yet waited for has none
    return total * 1024 / 1e6


def available_mb() -> float:
    """Memory that new processes can take without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found, "this kernel's /proc/meminfo has no MemAvailable"
    return int(found[1]) * 1024 / 1e6


def peak_tensors_mb(work: Callable[[], object]) -> float:
    """The largest sum of tensor bytes that `work` holds at one time, of those that it allocates itself.

    Every allocation and release of torch's CPU allocator counts, also those inside an operator and in the backward
    pass, which a hook on operators does not see. Buffers of the matrix library are not tensors and do not count.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report its start and end, and GPUs that are not there
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    # The sort is stable: moves of one instant stay in the order of the trace.
    moves = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"]))
    now = peak = 0
    for move in moves:
        now += int(move["args"]["Bytes"])
        peak = max(peak, now)
    return peak / 1e6


def tcp_bytes_sent() -> int:
    """Bytes that this process has sent over the TCP connections that it holds open, retransmissions not counted."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            copy = os.dup(int(entry))
        except OSError:  # closed since it was listed, as the folder's own descriptor is
            continue
        with socket.socket(fileno=copy) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
                sent, again = struct.unpack_from("QQ", info, _TCPI_BYTES_SENT)
                total += sent - again
    return total
