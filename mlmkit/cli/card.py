"""The command that describes a model for the Hugging Face Hub: card."""

from pathlib import Path

from mlmkit.cli.options import PATH, argument, command, option, option_class, switch
from mlmkit.console import say


@option_class
class CardOptions:
    model: str = argument("What to describe; README.md is written into it.", metavar="RUN|CHECKPOINT|ARTIFACT")
    license: str | None = option("--license", "Licence, by the Hub's identifier, such as apache-2.0.", metavar="ID")
    languages: tuple[str, ...] = option(
        "--language", "ISO 639 code of the language, such as pt. Repeatable.", multiple=True, metavar="CODE"
    )
    datasets: tuple[str, ...] = option(
        "--dataset", "A dataset on the Hub that the model was trained on. Repeatable.", multiple=True, metavar="NAME"
    )
    base_model: str | None = option("--base-model", "The model on the Hub that this one comes from.", metavar="NAME")
    results: tuple[Path, ...] = option(
        "--result", "Folder that mlmkit eval --output wrote. Repeatable.", multiple=True, metavar="RESULT", type=PATH
    )
    text: Path | None = option(
        "--text", "Take the example from this text.", shown_default="the run's held-out text", type=PATH, metavar="FILE"
    )
    overwrite: bool = switch("--overwrite", "Replace a README.md that mlmkit did not write, or that was edited.")


@command(CardOptions)
def card(options: CardOptions) -> None:
    """Write a model card for the Hugging Face Hub.

    \b
    For example:
      mlmkit card run --license apache-2.0 --language pt --result result

    The card, README.md, shows how the model is used, how it was trained, its metrics and its digests. The last line
    printed is the command that publishes the folder.
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
