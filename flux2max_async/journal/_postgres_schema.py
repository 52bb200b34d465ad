"""The tables of a journal in PostgreSQL, and the versions of their schema.

    entries      one row for each attempt of a request; the names of the columns are those of the SQLite file
    owners       the journals that are open, each with the number of the advisory lock that its connection holds
    totals       the sum of entries.outlay, in shards, so that hosts don't wait for each other
    states       what sessions have learned, by name
    version      one row: the version of these tables

An entry is held by the owner in its column `owner`, as long as that owner has a row in `owners` and its lock is held.
A limit that shares the schema counts the entries in the state `submitted`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flux2max_async._exceptions import JournalError

if TYPE_CHECKING:
    from psycopg import Connection

SCHEMA_VERSION = 1
TOTALS_SHARDS = 16
_ENCODINGS = ("UTF8", "SQL_ASCII")
"""The second one takes bytes as they come."""

# `begin_id` tells one call of begin() from all others: if the answer to a commit is lost, the call is repeated. Whoever
# waits for an entry to change sets `watched`. Names without a schema are those of the connection's search_path.
TABLES = (
    """CREATE TABLE entries (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL, attempt integer NOT NULL,
    content text NOT NULL, state text NOT NULL, owner text, task_id text, cost text, outlay bigint NOT NULL,
    created double precision, submitted double precision, ended double precision, request text NOT NULL,
    result text NOT NULL, files text NOT NULL, token text, begin_id text, watched boolean NOT NULL DEFAULT false,
    UNIQUE (key, attempt))""",
    "CREATE INDEX tasks ON entries (task_id) WHERE task_id IS NOT NULL",
    "CREATE INDEX held ON entries (owner) WHERE owner IS NOT NULL",
    "CREATE INDEX tokens ON entries (token) WHERE token IS NOT NULL",
    "CREATE INDEX running ON entries (state) WHERE state = 'submitted'",
    "CREATE TABLE owners (id text PRIMARY KEY, lock bigint NOT NULL)",
    "CREATE TABLE totals (shard integer PRIMARY KEY, outlay numeric NOT NULL)",
    f"INSERT INTO totals SELECT number, 0 FROM generate_series(0, {TOTALS_SHARDS - 1}) AS number",
    "CREATE TABLE states (name text PRIMARY KEY, value text NOT NULL)",
    # Whatever a function does is found by the search_path of its caller, which is this schema.
    f"""CREATE FUNCTION add_to_total() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE change numeric := NEW.outlay;
    BEGIN
        IF TG_OP = 'UPDATE' THEN change := change - OLD.outlay; END IF;
        UPDATE totals SET outlay = outlay + change WHERE shard = pg_backend_pid() % {TOTALS_SHARDS};
        RETURN NULL;
    END $$""",
    "CREATE TRIGGER add_to_total AFTER INSERT ON entries FOR EACH ROW EXECUTE FUNCTION add_to_total()",
    """CREATE TRIGGER update_total AFTER UPDATE OF outlay ON entries
    FOR EACH ROW WHEN (NEW.outlay != OLD.outlay) EXECUTE FUNCTION add_to_total()""",
    "CREATE TABLE version (version integer NOT NULL)",
    f"INSERT INTO version VALUES ({SCHEMA_VERSION})",
)


def check_encoding(connection: "Connection[Any]", journal: object) -> None:
    """Check that the database can store every text: otherwise one request would make those beside it fail.

    Raises:
        JournalError: It can't.
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding not in _ENCODINGS:
        raise JournalError(f"the journal {journal} needs a database with the encoding UTF8, not {encoding}")


def table_creator(connection: "Connection[Any]", journal: object) -> Callable[[], None]:
    """Return the function that creates the tables which don't exist, in the transaction that it is called in.

    Args:
        connection: Its search_path is the schema.
        journal: The journal's name in errors.
    """

    def create_tables() -> None:
        if not check_version(connection, journal):
            for statement in TABLES:
                connection.execute(statement.encode())

    return create_tables


def check_version(connection: "Connection[Any]", journal: object) -> bool:
    """Check that the tables, if there are any, are those of a known version; return whether there are any.

    Raises:
        JournalError: Another version wrote them, or they are another application's.
    """
    names = connection.execute(
        "SELECT c.relname FROM pg_class c WHERE c.relnamespace = to_regnamespace(quote_ident(current_schema()))"
        " AND c.relname IN ('entries', 'owners', 'totals', 'states', 'version') AND c.relkind IN ('r', 'p')"
    ).fetchall()
    if not names:
        return False
    row = None
    if ("version",) in names:
        row = connection.execute("SELECT to_jsonb(v) ->> 'version' FROM version v").fetchone()
    if row is None or row[0] is None or not str(row[0]).isdecimal():
        raise JournalError(f"the schema of {journal} has tables that are not a journal's; it was left as it is")
    version = int(row[0])
    if version != SCHEMA_VERSION:
        age, advice = (
            ("a newer", "update flux2max_async")
            if version > SCHEMA_VERSION
            else ("an older", "use another schema, or the version of flux2max_async that wrote it")
        )
        raise JournalError(
            f"the journal {journal} was written by {age} version (schema {version}, known is {SCHEMA_VERSION}): "
            f"{advice}; it was left as it is"
        )
    return True
