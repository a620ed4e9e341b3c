"""The errors that a user of tfqc sees: one sentence that says what, where and what to do, and notes for context."""


class TfqcError(Exception):
    """Base of every error that tfqc raises on purpose.

    The message is one sentence for the user. `notes` are further lines (the IR line, the source line, a list of
    inputs) that the command line prints below it, dimmed.
    """

    def __init__(self, message: str, *notes: str) -> None:
        super().__init__(message)
        for note in notes:
            self.add_note(note)

    @property
    def notes(self) -> list[str]:
        """Context lines, in the order in which they were added."""
        return list(getattr(self, "__notes__", []))


class CaptureError(TfqcError):
    """The model could not be turned into a Program."""


class IRError(TfqcError):
    """IR text that does not parse, or a node that cannot be typed."""


class VerifyError(TfqcError):
    """A Program that breaks an invariant of the stage that it claims."""


class SpecError(TfqcError):
    """Text of the form `name{option=value}` that is malformed, or names an unknown option."""


class RecipeError(TfqcError):
    """A recipe that is none, says what cannot be, or is not what was compiled."""


class PipelineError(TfqcError):
    """A pipeline that cannot work, found before anything runs."""


class PassError(TfqcError):
    """A pass that failed while it ran."""


class CalibrationError(TfqcError):
    """Calibration data or weights that cannot be calibrated on (NaN, an empty schedule, too few samples)."""


class ArtifactError(TfqcError):
    """A directory that is not a whole, unchanged artifact of a version that this tfqc reads."""


def suggest(word: str, known: list[str]) -> str:
    """` Did you mean ...?` when a known name is close to `word`, else a list of what is known."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known)) or 'none'}."
