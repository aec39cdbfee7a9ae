"""A launcher for compilers and linkers: what one made before, by the same command from the same files, is copied.

    python compile_once.py STORE FOLDER PROGRAM [ARGUMENTS]

Paths under FOLDER count as the same wherever it is. It knows the headers in its tree/csrc.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

store, folder, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
digest = hashlib.sha256("\0".join(command).replace(str(folder), "").encode())
sources = [Path(word) for word in command if word.endswith((".cc", ".cxx", ".o", ".a"))]
for path in (*sources, *sorted(folder.glob("tree/csrc/*.h"))):
    if path.exists():
        digest.update(path.read_bytes())
made, target = store / digest.hexdigest(), command[command.index("-o") + 1]
if made.exists():
    shutil.copy(made, target)
elif status := subprocess.run(command).returncode:
    sys.exit(status)
else:
    shutil.copy(target, made)
