"""Exceptions and warnings for users. The command line turns each exception into one message and exit code 2."""


class SecateurError(Exception):
    """An error the user can act on; the message says what is wrong, where, and what to do."""


class InputError(SecateurError):
    """An invalid name, path, number or setting."""


class ModelError(SecateurError):
    """A checkpoint that cannot be opened, is not a supported decoder, or is damaged."""


class NumericsError(SecateurError):
    """NaN or infinity in weights, activations or a score; never turned into a number."""


class CheckError(SecateurError):
    """A written checkpoint does not behave like the model it was written from."""


class SecateurWarning(UserWarning):
    """Something the user should know; the command continues."""


class TextsWarning(SecateurWarning):
    """The texts differ from those a plan was made on."""


class TrainingWarning(SecateurWarning):
    """A training run ended early or gained nothing."""


def unknown(what: str, name: str, known: list[str]) -> InputError:
    """Return the error for an unknown name, listing the known ones and suggesting the closest."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return InputError(f"unknown {what} '{name}'.{hint} Known: {', '.join(known)}.")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the exception's type if it is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
