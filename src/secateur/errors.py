"""What can go wrong, in few kinds. The command line turns each into one message and exit code 2."""


class SecateurError(Exception):
    """Something the user can act on: the message says what, where and what to do."""


class InputError(SecateurError):
    """A name, path, number or setting that cannot be used."""


class ModelError(SecateurError):
    """A checkpoint that cannot be opened, is not a supported decoder, or is damaged."""


class NumericsError(SecateurError):
    """NaN or infinity in weights, activations or a score; never turned into a number."""


class CheckError(SecateurError):
    """A written checkpoint did not behave like the model it was written from."""


class SecateurWarning(UserWarning):
    """Something the user should know that stops nothing."""


class TextsWarning(SecateurWarning):
    """The texts are not those that a plan was made on."""


class TrainingWarning(SecateurWarning):
    """A training run ended early or gained nothing."""


def unknown(what: str, name: str, known: list[str]) -> InputError:
    """Build the error for a name that is not known, naming those that are and the nearest one."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return InputError(f"unknown {what} '{name}'.{hint} Known: {', '.join(known)}.")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
