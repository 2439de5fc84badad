"""Samples in tar files, on the disk or on a web server, as webdataset writes them: read in place, never unpacked.

From the bottom: `access`, `connection`, `http` and `pool` reach bytes; `tar` and `read` find samples in them, once, for
an `index`; a `table` is the indexes of all shards; `order` shuffles its samples, `items` makes them, `cache` keeps what
they are encoded to; before a run `copies` finds what is there more than once, `words` reads the captions, and `check`
accounts for all.
"""
