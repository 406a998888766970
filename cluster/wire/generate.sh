#!/bin/sh
# Makes the modules of this folder from ring.proto; needs grpcio-tools. Run it in the root of the project.
set -e
out=$(mktemp -d)
python -m grpc_tools.protoc -Ilocalreason/cluster/wire=cluster/wire --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" cluster/wire/ring.proto
mv "$out"/localreason/cluster/wire/* cluster/wire/
rm -r "$out"
