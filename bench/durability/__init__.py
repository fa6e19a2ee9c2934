"""A campaign against what a run keeps: kills, full disks, damaged files, folders without rights, rivals, clocks.

    python -m bench.durability [--part NAME ...] [--jobs J] [--seed S] [--share X] [--json FILE]

Every trial runs commands as a user would, does something to them or to their files, follows what the messages advise,
and compares what is there in the end with an undisturbed run, bit for bit. Nothing of `ris_fast` reads the results:
`reading.py` parses files by their published formats.
"""
