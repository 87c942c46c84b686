"""What the images server answers, recorded: exchanges, how they are played, and their answers.

`exchanges` lists the requests, the ``.jsonl`` files hold what came of each. The test beside this
package plays them again and compares; ``python -m tests.server.recorded`` records them anew.
"""
