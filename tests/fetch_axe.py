"""Fetches axe-core, which checks pages for what hinders people, from the npm registry: ``fetch_axe.py FOLDER``."""

import base64
import hashlib
import io
import sys
import tarfile
import urllib.request
from pathlib import Path

SOURCE = "https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz"
SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="  # the registry's

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with urllib.request.urlopen(SOURCE, timeout=60) as answer:
        content = answer.read()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        sys.exit(f"{SOURCE}: not the file that is expected")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "axe.min.js").write_bytes(file.read())
