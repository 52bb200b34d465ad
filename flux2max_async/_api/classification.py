"""What the words of an error mean: an empty balance, or a refusal by moderation. Pure functions of text.

Only the words of the service itself count. An error may quote the prompt, so quoted text is ignored.
"""

import re

BALANCE_CODES = frozenset(str(code) for code in range(40201, 40209))  # [C]

# [C], [D] The phrases of several gateways of the platform.
_BALANCE = re.compile(
    r"insufficient (balance|credits?)|exhausted balance|in arrears|exceeded your current quota", re.IGNORECASE
)
_MODERATION_CODE = re.compile(
    r"(content )?moderation blocked|(content|request) moderated|content policy violation|content filter(ed)?"
    r"|safety(?! (tolerance|level|setting)).*|nsfw.*"
)
# [B] "Request Moderated", "Content Moderated".
_MODERATION = re.compile(
    r"moderat(ed|ion)|content.?policy|content.?filter|nsfw|sensitive content"
    r"|flagged as (\w+ )?(sensitive|inappropriate|unsafe|harmful)"
    r"|(prompts?|inputs?|images?|content|requests?) (was|were|(has|have) been|is|are) flagged"
    r"|safety (system|filter|check|checker|policy|policies|guidelines|violation|reasons|concerns)"
    r"|(by|for|our) (the )?safety\b(?! (tolerance|level|setting))"
)
# Moderation itself did not work, so it has refused nothing.
_MODERATOR = r"(moderation|safety|content.?filter|content.?policy|nsfw)\b"
_OUTAGE = (
    r"\b(timed out|time ?out|unavailable|not available|unreachable|overloaded|temporarily|is down"
    r"|(internal|service|server|connection) (error|failure)|connection (reset|refused)"
    r"|not respond|no (response|answer)|(not|failed to|unable to|error) (reach|contact|connect|call)(ing)?)\b"
)
_MODERATION_OUTAGE = re.compile(f"{_MODERATOR}.{{0,60}}{_OUTAGE}|{_OUTAGE}.{{0,60}}{_MODERATOR}")
# The parameter is wrong, not the content.
_PARAMETER = r"(safety|moderation) (tolerance|level|setting)s?\b"
_WRONG_PARAMETER = re.compile(
    rf"{_PARAMETER}.{{0,60}}\b(must|should|cannot|may not|invalid|valid|wrong|between|range|integer|number|expected"
    rf"|unknown|unsupported|at (most|least)|(less|greater|more) than)\b"
    rf"|\b(invalid|wrong|unknown|unsupported)( \w+){{0,3}} {_PARAMETER}"
)
# From the first to the last mark, since the prompt may contain some. A message that was cut may lack the last one.
_QUOTATION = re.compile(
    r"""(?<!\w)'(.*'(?!\w)|.*)|"(.*"|.*)|`(.*`|.*)|\u201c(.*\u201d|.*)|\u2018(.*\u2019|.*)|\xab(.*\xbb|.*)""", re.DOTALL
)


def is_balance_error(codes: list[str], message: str) -> bool:
    """Return whether an error says that the account can't pay.

    Args:
        codes: All codes in its body.
        message: Its message.
    """
    if not BALANCE_CODES.isdisjoint(codes):
        return True
    words = " ".join(map(_without_quotations, (*codes, message)))  # a code may be a whole sentence
    return _BALANCE.search(words.replace("_", " ")) is not None


def is_moderation(code: str | None, message: str) -> bool:
    """Return whether an error says that moderation refused the content, and not that moderation itself has failed."""
    code_words = re.sub(r"[\s_-]+", " ", code or "").strip().lower()
    if _MODERATION_CODE.fullmatch(code_words):
        return _MODERATION_OUTAGE.search(code_words) is None
    words = re.sub(r"[\s_]+", " ", f"{code_words}: {_without_quotations(message)}").lower()
    if _MODERATION.search(words) is None:
        return False
    return _MODERATION_OUTAGE.search(words) is None and _WRONG_PARAMETER.search(words) is None


def _without_quotations(text: str) -> str:
    return _QUOTATION.sub("", text)
