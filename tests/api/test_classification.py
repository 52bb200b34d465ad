"""Words: what moderation and an empty balance look like, and what only looks like them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2max_async._api.classification import is_balance_error, is_moderation


@pytest.mark.parametrize(
    "code",
    [
        *("moderation_blocked", "content_policy_violation", "content_filter", "content_moderated"),
        *(
            "request_moderated",
            "Request Moderated",
            "CONTENT-MODERATED",
            "content_filtered",
            "content_moderation_blocked",
        ),
        *(
            "safety",
            "safety_violation",
            "safety_system",
            "SAFETY_CHECK_FAILED",
            "safety-blocked",
            "nsfw",
            "nsfw_content",
        ),
    ],
)
@pytest.mark.parametrize("message", ["no", "", "Moderation service timed out", "safety_tolerance must be at most 5"])
def test_code_of_moderation(code: str, message: str) -> None:
    """The code of a refusal by moderation decides, whatever the message says."""
    assert is_moderation(code, message)


@pytest.mark.parametrize(
    "message",
    [
        *("Request Moderated", "Content Moderated", "The output was moderated.", "moderation_blocked"),
        *("Blocked by moderation", "Your request did not pass content moderation", "content policy violation"),
        *("This violates our content policy.", "The prompt triggered the content filter", "content_policy_violation"),
        *("NSFW content", "nsfw_detected", "This image contains sensitive content"),
        *("The input was flagged as sensitive", "flagged as potentially harmful", "Flagged as inappropriate"),
        *("Your prompt was flagged", "The images were flagged by our system", "the request has been flagged"),
        *("Your request was rejected as a result of our safety system.", "rejected by the safety filter"),
        *("refused for safety reasons", "blocked by safety", "blocked for safety", "safety guidelines"),
        "Moderated; try again with another prompt",
        "Your prompt 'a cat' was flagged as sensitive",
        "Content Moderated: try a higher safety_tolerance",
    ],
)
@pytest.mark.parametrize("code", [None, "invalid_request", "400"])
def test_words_of_moderation(code: str | None, message: str) -> None:
    """The words of a refusal by moderation are recognized without a code of its own."""
    assert is_moderation(code, message)


@pytest.mark.parametrize(
    "message",
    [
        "Moderation service timed out, try again",
        "moderation service timeout",
        "The moderation service is temporarily unavailable",
        "Moderation is unavailable",
        "moderation service is overloaded, please retry",
        "moderation: internal error",
        "moderation service error",
        "The safety system did not respond",
        "safety checker unreachable",
        "safety check failed: connection refused",
        "content filter unavailable",
        "content_policy service is down",
        "Timed out waiting for moderation",
        "could not reach the moderation service",
        "failed to connect to content moderation",
        "error calling the moderation API",
        "no response from the moderation service",
    ],
)
@pytest.mark.parametrize("code", [None, "timeout", "internal_error", "invalid_request"])
def test_outage_of_moderation(code: str | None, message: str) -> None:
    """If moderation itself did not work, it has refused nothing, and the same request may pass later."""
    assert not is_moderation(code, message)


@pytest.mark.parametrize(
    "code", ["moderation_timeout", "safety_service_unavailable", "nsfw_check_timeout", "moderation_service_error"]
)
def test_code_of_an_outage(code: str) -> None:
    """The code of such an outage is recognized, too."""
    assert not is_moderation(code, "the request could not be checked")


@pytest.mark.parametrize(
    "message",
    [
        "safety_tolerance must be between 0 and 5",
        "safety_tolerance must be at most 5: 0 is the strictest moderation",
        "Invalid value for safety_tolerance",
        "invalid moderation level",
        "unknown parameter for safety tolerance",
        "moderation_level must be an integer",
        "safety tolerance should be less than 6",
        "Input for safety_tolerance is out of range",
        "safety setting expected a number",
    ],
)
@pytest.mark.parametrize("code", [None, "invalid_parameter", "safety_tolerance", "invalid_safety_tolerance"])
def test_wrong_parameter_of_moderation(code: str | None, message: str) -> None:
    """A wrong parameter of moderation is a wrong parameter."""
    assert not is_moderation(code, message)


QUOTATIONS = (
    "'{}'",
    '"{}"',
    "`{}`",
    "\u201c{}\u201d",
    "\u2018{}\u2019",
    "\xab{}\xbb",
    "'it's {}'",
    '"a "{}" b"',
    "'{}",
    '"{}',
)


@pytest.mark.parametrize("quotation", QUOTATIONS)
@pytest.mark.parametrize(
    "prompt", ["flagged as sensitive", "NSFW", "content policy", "insufficient balance", "in arrears"]
)
def test_quoted_prompt(prompt: str, quotation: str) -> None:
    """The words of a prompt that the error quotes don't count, whatever marks it is quoted with."""
    message = f"width is wrong for the prompt {quotation.format(prompt)}"

    assert not is_moderation("invalid_parameter", message)
    assert not is_balance_error(["invalid_parameter"], message)


@pytest.mark.parametrize("message", ["it isn't allowed: in arrears", "the users' account is in arrears, isn't it?"])
def test_apostrophe_is_no_quotation(message: str) -> None:
    """An apostrophe within or after a word quotes nothing."""
    assert is_balance_error([], message)


@pytest.mark.parametrize(
    "message",
    [
        "the prompt is too long",
        "width must be at least 64",
        "immoderate",
        "no content",
        "a policy",
        "flagged",
        "Forbidden",
    ],
)
@pytest.mark.parametrize("code", [None, "", "bad_prompt", "7", "unsafe_url"])
def test_other_words(code: str | None, message: str) -> None:
    """Any other error is neither a refusal by moderation nor an empty balance."""
    assert not is_moderation(code, message)
    assert not is_balance_error([code or ""], message)


@pytest.mark.parametrize(
    "words",
    [
        *(
            "insufficient balance",
            "Insufficient_Balance",
            "INSUFFICIENT CREDITS",
            "insufficient_credit",
            "exhausted balance",
        ),
        *("The account is in arrears", "You exceeded your current quota, please check your plan"),
    ],
)
def test_words_of_an_empty_balance(words: str) -> None:
    """The words that report an empty balance count in a code and in a message."""
    assert is_balance_error([words], "no")
    assert is_balance_error([], words)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        *(([str(code)], True) for code in range(40201, 40209)),
        *((["402", "40203"], True), (["40203", "402"], True), (["40200"], False), (["40209"], False), ([], False)),
        *((["402"], False), (["402010"], False), (["x40201"], False)),
    ],
)
def test_codes_of_an_empty_balance(codes: list[str], expected: bool) -> None:
    """Any of the documented codes reports an empty balance, whatever other codes there are."""
    assert is_balance_error(codes, "no") is expected


@settings(max_examples=100, deadline=None)
@given(st.none() | st.text(), st.text())
def test_any_words(code: str | None, message: str) -> None:
    """Any text is classified, and quoting all of it leaves only what the code says."""
    assert is_moderation(code, message) in {True, False}
    assert is_moderation(code, f'"{message}"') is is_moderation(code, "")
    assert is_balance_error([code or ""], f'"{message}"') is is_balance_error([code or ""], "")
