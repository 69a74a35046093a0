//! Every statement of a store, in the SQL that SQLite and PostgreSQL share. What differs between them, the types of
//! the columns, is in each backend's schema.

pub(crate) const META_GET: &str = "SELECT value FROM meta WHERE name = $1";
pub(crate) const META_IDENTITY: &str = "SELECT name, value FROM meta WHERE name IN ('epoch', 'sequence')";
pub(crate) const META_SET: &str =
    "INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value";

pub(crate) const DOCUMENT_STATE: &str = "SELECT version, deleted FROM documents WHERE kind = $1 AND id = $2";
pub(crate) const DOCUMENT_WRITE: &str = "INSERT INTO documents (kind, id, version, sequence, schema_number, body, deleted) \
     VALUES ($1, $2, $3, $4, $5, $6, NULL) \
     ON CONFLICT (kind, id) DO UPDATE SET version = excluded.version, sequence = excluded.sequence, \
     schema_number = excluded.schema_number, body = excluded.body, deleted = NULL";
pub(crate) const DOCUMENT_BURY: &str = "UPDATE documents SET version = $3, sequence = $4, body = '', deleted = $5 \
     WHERE kind = $1 AND id = $2";
pub(crate) const DOCUMENT_GET: &str = "SELECT kind, id, version, sequence, schema_number, body, deleted FROM documents \
     WHERE kind = $1 AND id = $2 AND deleted IS NULL";
/// By id, from `$2` to before `$3`, after `$4`.
pub(crate) const DOCUMENT_LIST: &str = "SELECT kind, id, version, sequence, schema_number, body, deleted FROM documents \
     WHERE kind = $1 AND id >= $2 AND id < $3 AND id > $4 AND deleted IS NULL ORDER BY id LIMIT $5";
/// After the position (`$2`, `$3`); tombstones only where they are newer than `$4`.
pub(crate) const DOCUMENT_CHANGES: &str = "SELECT kind, id, version, sequence, schema_number, body, deleted FROM documents \
     WHERE kind = $1 AND (sequence > $2 OR (sequence = $2 AND id > $3)) AND (deleted IS NULL OR sequence > $4) \
     ORDER BY sequence, id LIMIT $5";

pub(crate) const WATERMARK_GET: &str =
    "SELECT version FROM watermarks WHERE source_kind = $1 AND source_id = $2";
pub(crate) const WATERMARK_SET: &str = "INSERT INTO watermarks (source_kind, source_id, version) VALUES ($1, $2, $3) \
     ON CONFLICT (source_kind, source_id) DO UPDATE SET version = excluded.version";

pub(crate) const ANSWER_GET: &str = "SELECT request_digest, answer FROM answers WHERE request = $1";
pub(crate) const ANSWER_ADD: &str =
    "INSERT INTO answers (request, request_digest, answer, created) VALUES ($1, $2, $3, $4)";

/// The number of the next event of one version of an aggregate.
pub(crate) const EVENT_NEXT_INDEX: &str = "SELECT COALESCE(MAX(place), -1) + 1 AS next FROM outbox \
     WHERE aggregate_kind = $1 AND aggregate_id = $2 AND aggregate_version = $3";
pub(crate) const EVENT_ADD: &str = "INSERT INTO outbox (sequence, id, aggregate_kind, aggregate_id, aggregate_version, place, \
     service, entity, verb, server, payload, time, traceparent, created, sent) \
     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, NULL)";
pub(crate) const EVENT_UNSENT: &str = "SELECT sequence, id, aggregate_kind, aggregate_id, aggregate_version, \
     service, entity, verb, server, payload, time, traceparent FROM outbox \
     WHERE sent IS NULL ORDER BY sequence LIMIT $1";
pub(crate) const EVENT_LOG: &str = "SELECT sequence, id, aggregate_kind, aggregate_id, aggregate_version, \
     service, entity, verb, server, payload, time, traceparent FROM outbox \
     WHERE sequence > $1 ORDER BY sequence LIMIT $2";
pub(crate) const EVENT_SENT: &str = "UPDATE outbox SET sent = $2 WHERE sequence = $1 AND sent IS NULL";

pub(crate) const AUDIT_ADD: &str = "INSERT INTO audit (sequence, time, actor, action, subject, request, body) VALUES ($1, $2, $3, $4, $5, $6, $7)";
pub(crate) const AUDIT_LIST: &str =
    "SELECT sequence, body FROM audit WHERE sequence < $1 ORDER BY sequence DESC LIMIT $2";
pub(crate) const AUDIT_AFTER: &str =
    "SELECT sequence, body FROM audit WHERE sequence > $1 ORDER BY sequence LIMIT $2";

/// An event that the broker has not stored is never dropped, however old.
pub(crate) const PRUNE_EVENTS: &str = "DELETE FROM outbox WHERE sent IS NOT NULL AND created < $1";
pub(crate) const PRUNE_ANSWERS: &str = "DELETE FROM answers WHERE created < $1";
pub(crate) const PRUNE_TOMBSTONES: &str = "DELETE FROM documents WHERE deleted IS NOT NULL AND deleted < $1";
/// The newest tombstone that [`PRUNE_TOMBSTONES`] is about to drop; 0 for none.
pub(crate) const NEWEST_PRUNABLE: &str =
    "SELECT COALESCE(MAX(sequence), 0) AS newest FROM documents WHERE deleted IS NOT NULL AND deleted < $1";
