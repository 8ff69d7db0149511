"""A row of numbers for every epoch of a training: training.csv, and TensorBoard if it is installed."""

import csv
import os
import sys

from runtime.files import write_atomically

COLUMNS = ("stage", "epoch", "loss", "accuracy", "validation_accuracy", "learning_rate", "seconds", "images_per_second")


class Log:
    """Appends a row an epoch to `folder`/training.csv, which begins anew unless `resume`.

    loss, accuracy: means over the epoch's training images, as they were when trained on; the accuracy in percent.
    learning_rate: of the optimizer's first group at the start of the epoch. What does not exist stays empty.
    Raises OSError if the folder cannot be written; later, a full disk does not end the training.
    """

    def __init__(self, folder, resume=False):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "training.csv")
        self.earlier = read_rows(self.path) if resume else []  # until the first new row shows which of them stay
        self.is_begun, self.warned = False, False
        self.board = open_board(folder)

    def write(self, progress):
        """Add the row of the epoch that `progress` has just ended."""
        sums, validated = progress.plain_sums(), progress.validated or {}
        row = {
            "stage": progress.stage,
            "epoch": progress.epoch,
            "loss": sums["loss"] / sums["samples"],
            "accuracy": 100 * sums["right"] / sums["labelled"] if sums["labelled"] else None,
            "validation_accuracy": validated.get("top1"),
            "learning_rate": sums["rate"],
            "seconds": sums["seconds"],
            "images_per_second": sums["samples"] / max(sums["seconds"], 1e-9),
        }
        try:
            self.begin(row)
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([in_digits(row[name]) for name in COLUMNS])
        except OSError as error:
            if not self.warned:
                print(f"warning: cannot write {self.path} ({error}); the training goes on", file=sys.stderr)
            self.warned = True
        self.show(row)

    def begin(self, row):
        """Before the first row: keep the rows of the run that is resumed, up to the epoch that begins again."""
        if self.is_begun:
            return
        now = [row["stage"], str(row["epoch"])]
        kept = self.earlier[: next((i for i, each in enumerate(self.earlier) if each[:2] == now), None)]

        def write(temporary):
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([COLUMNS, *kept])

        write_atomically(self.path, write)
        self.is_begun = True

    def show(self, row):
        """Give the numbers of a row to TensorBoard."""
        if self.board is not None:
            for name in COLUMNS[2:]:
                if row[name] is not None:
                    self.board.add_scalar(f"{row['stage']}/{name}", row[name], row["epoch"])
            self.board.flush()

    def close(self):
        """Close the files."""
        if self.board is not None:
            self.board.close()


def read_rows(path):
    """The rows of a training.csv below its head; none if there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def in_digits(value):
    """An entry of a row: six digits of a number, an empty text for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def open_board(folder):
    """TensorBoard's writer for a folder; None, with a line on stderr, if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("--log: training.csv alone; pip install tensorboard adds files of TensorBoard", file=sys.stderr)
        return None
    return SummaryWriter(folder)
