"""The commands, from typed options to one-line errors.

Hands out what train.py and analyze.py call. May use all other rooms.

    command_line.py  a user's mistake ends in one line
"""
