"""What the notebooks share: pictures, the source of a class, and exercises that grade themselves."""

from __future__ import annotations

import contextlib
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from IPython.display import Markdown, display
from matplotlib.figure import Figure

warnings.filterwarnings("ignore", "IProgress not found")  # from tqdm, whose progress bars no notebook shows

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "Book"

# Pictures are transparent. The grey has a contrast of at least 4.2 on white and on the dark backgrounds of GitHub and
# JupyterLab. The colours are those of Okabe and Ito (jfly.uni-koeln.de/color) with at least 3 on both.
INK = "#7a7a7a"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "cividis",
    "font.size": 11,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
matplotlib.rcParams.update(STYLE)  # also for what is drawn into a figure later


def figure(width: float = 7.0, height: float = 2.6, columns: int = 1, rows: int = 1, **options: Any) -> Any:
    """(Figure, axes) as of plt.subplots, transparent and readable in light and dark. width, height: inches in all."""
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns, **options)


def show(fig: Figure, alt: str) -> None:
    """Display a figure as a PNG. alt: what it shows, for readers who cannot see it and for the tests."""
    png = BytesIO()
    fig.savefig(png, format="png", dpi=110)
    data = {"image/png": png.getvalue(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def source(thing: Any) -> None:
    """Display the source code of a class or function, without copying it into the notebook."""
    code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    display(Markdown(f"```python\n{code}\n```"))


@contextlib.contextmanager
def grading(exercise: str) -> Iterator[None]:
    """Run the assertions of an exercise and print what they say, instead of stopping the notebook."""
    try:
        yield
    except NotImplementedError:
        print(f"Exercise {exercise}: write your code in the cell above, then run it and this one.")
    except AssertionError as error:
        print(f"Exercise {exercise}: not yet. {error}")
    except Exception as error:
        print(f"Exercise {exercise}: not yet. Your code raised {type(error).__name__}: {error}")
    else:
        print(f"Exercise {exercise}: solved.")
