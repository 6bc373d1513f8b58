"""The trust boundary: files are written whole or not at all, and read within bounds.

Hands out functions that write atomically and readers that refuse hostile files. May use support.

The threat: a checkpoint, run folder or picture from elsewhere, made to run code, to exhaust memory or time, to be
written where it should not be, or broken on its way. Each reader checks before it believes and raises one line that
names the file. What is promised, and what is not, stands in SECURITY.md.

    atomic.py        write one file, JSON or text so that a killed process leaves the old or the new one
    digests.py       SHA-256 of files, weights and models
    films.py         write films: WebP, GIF, MP4
    plain_files.py   read JSON and YAML of bounded size and depth
    staging.py       replace the files of a folder all together or not at all
    tensor_files.py  read torch archives and safetensors within bounds, without running code
    weights.py       check tensors that came from a file
"""
