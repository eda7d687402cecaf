"""``nearfar demo``: the whole product in one go, as child processes of one command.

It shows what the packages do together and imports none but this one: converting, proving
and serving are commands that it starts, and the emulated phone is a child process too.
"""
