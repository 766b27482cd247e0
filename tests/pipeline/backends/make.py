"""Write RELEASE.binpb from a folder with the unpacked packages of a release; see README.md."""

import ast
import re
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2

MODULES = ("pipeline_spec/pipeline_spec_pb2.py", "kubernetes/kubernetes_executor_config_pb2.py")


def main(release: str, folder: str) -> None:
    descriptors = descriptor_pb2.FileDescriptorSet()
    for module in MODULES:
        source = (Path(folder) / "kfp" / module).read_text(encoding="utf-8")
        found = re.search(r"AddSerializedFile\((b'.*?(?<!\\)')\)", source, re.DOTALL)
        if not found:
            sys.exit(f"{module}: no descriptor")
        descriptors.file.add().ParseFromString(ast.literal_eval(found[1]))
    data = descriptors.SerializeToString(deterministic=True)
    (Path(__file__).parent / f"{release}.binpb").write_bytes(data)


if __name__ == "__main__":
    main(*sys.argv[1:])
