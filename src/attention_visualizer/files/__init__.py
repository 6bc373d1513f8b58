"""The trust boundary: files are written whole or not at all, and read within bounds.

Hands out functions that write atomically and readers that refuse hostile files. May use support.

    atomic.py        write one file, JSON or text so that a killed process leaves the old or the new one
    plain_files.py   read JSON and YAML of bounded size and depth
    staging.py       replace the files of a folder all together or not at all
    tensor_files.py  read torch archives and safetensors within bounds, without running code
    weights.py       check tensors that came from a file
"""
