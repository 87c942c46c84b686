"""Images without a server, in this process, with a preview of each on its way.

    python examples/offline.py [MODEL] [PROMPT...]

MODEL is a folder or a repo id; by default the released Turbo. All prompts step together.
"""

import sys

from krea2_srt import ImageProgress, Krea2

name = sys.argv[1] if len(sys.argv) > 1 else "krea/Krea-2-Turbo"
prompts = sys.argv[2:] or ["a red fox sitting in fresh snow", "a red fox in a wheat field"]


def show(progress: ImageProgress) -> None:
    if progress.preview is not None:
        file = f"preview_{progress.index}.png"
        progress.preview.save(file)
        print(file)


model = Krea2.load(name)
for number, image in enumerate(model.generate(prompts, seed=7, previews=1, on_progress=show)):
    file = f"image_{number}.png"
    image.save(file)
    print(file)
