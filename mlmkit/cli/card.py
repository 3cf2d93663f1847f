"""The command that describes a model for the Hugging Face Hub: card."""

from pathlib import Path

from mlmkit.cli.options import PATH, argument, command, option, option_class, switch
from mlmkit.console import say


@option_class
class CardOptions:
    model: str = argument(metavar="RUN|CHECKPOINT|ARTIFACT")
    license: str | None = option("--license", "The Hub's identifier of the licence, such as apache-2.0.", metavar="ID")
    languages: tuple[str, ...] = option(
        "--language", "ISO 639 code of the language, such as pt. Repeatable.", multiple=True, metavar="CODE"
    )
    datasets: tuple[str, ...] = option(
        "--dataset", "A dataset on the Hub that the model was trained on. Repeatable.", multiple=True, metavar="NAME"
    )
    base_model: str | None = option("--base-model", "The model on the Hub that this one comes from.", metavar="NAME")
    results: tuple[Path, ...] = option(
        "--result", "Folder that `mlmkit eval` wrote. Repeatable.", multiple=True, metavar="RESULT", type=PATH
    )
    text: Path | None = option(
        "--text", "Take the example from this text. Default: the run's held-out text.", type=PATH
    )
    overwrite: bool = switch("--overwrite", "Replace a README.md that mlmkit did not write, or that was edited.")


@command(CardOptions)
def card(options: CardOptions) -> None:
    """Write the model card (README.md) for the Hugging Face Hub.

    Shows how the model is used, how it was trained, its metrics and its digests. The last line printed is the command
    that publishes the folder.
    """
    from mlmkit.card import write_card
    from mlmkit.locations import Source

    values = {**vars(options), "text": Source(str(options.text)) if options.text else None}
    written = write_card(values.pop("model"), **values)
    say(f"card: {written.path}")
    if written.example:
        say(f"example: {written.example}")
    say("publish it:")
    say(written.command)
