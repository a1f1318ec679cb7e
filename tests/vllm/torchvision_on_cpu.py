"""Makes a CUDA build of torchvision importable beside a CPU build of torch: `python torchvision_on_cpu.py`.

Package indices often have no other build. Its compiled half cannot load there, so the operators `nms` and `qnms`, which
no processor of images calls, have no schema, and the import dies of that. Declared beforehand, it succeeds. The
declaration goes into site-packages with a .pth file, so that the processes that vLLM starts have it too; nothing is
written where torchvision can be imported as it is.
"""

import importlib.abc
import importlib.machinery
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Wraps the loader of torchvision: torch itself is only imported when torchvision is."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def declared(module):
            import torch

            if not hasattr(torch, "_torchvision_operators"):  # kept: a library that is collected takes them along
                library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                torch._torchvision_operators = library
            execute(module)

        spec.loader.exec_module = declared
        return spec


if __name__ == "__main__":
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        site = Path(sysconfig.get_paths()["purelib"])
        shutil.copy(__file__, site / "torchvision_on_cpu.py")
        (site / "torchvision_on_cpu.pth").write_text("import torchvision_on_cpu\n")
        subprocess.run([sys.executable, "-c", "import torchvision"], check=True)
else:
    sys.meta_path.insert(0, _DeclareOperators())
