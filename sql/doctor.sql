-- What the doctor asks the catalogs: is the schema whole (F65), may each role do what it must and nothing else (I17).
-- keyrotation/adapters/schema.py reads these statements; each runs as the role that it asks about.

-- name: found
-- What there is of what sql/schema.sql makes. `works` is false for a trigger that is switched off, an index that is invalid or not unique, a
-- constraint that was never validated. `body` is a function's text, to be held against the file's.
SELECT 'column' AS kind, attname || ' of ' || nspname || '.' || relname AS name, true AS works, NULL AS body
FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE attnum > 0 AND NOT attisdropped AND relkind IN ('r', 'p') AND (nspname = 'key_rotation' OR (nspname, relname) = ('public', 'signing_keys'))
UNION ALL
SELECT 'trigger', tgname || ' on ' || nspname || '.' || relname, tgenabled IN ('O', 'A'), NULL
FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE NOT tgisinternal AND (nspname = 'key_rotation' OR (nspname, relname) = ('public', 'signing_keys'))
UNION ALL
SELECT 'unique index', index.relname || ' on ' || nspname || '.' || pg_class.relname, indisunique AND indisvalid, NULL
FROM pg_index JOIN pg_class AS index ON index.oid = indexrelid JOIN pg_class ON pg_class.oid = indrelid
JOIN pg_namespace ON pg_namespace.oid = pg_class.relnamespace
WHERE nspname = 'key_rotation' OR (nspname, pg_class.relname) = ('public', 'signing_keys')
UNION ALL
SELECT 'constraint', conname || ' on ' || nspname || '.' || relname, convalidated, NULL
FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE contype = 'c' AND (nspname = 'key_rotation' OR (nspname, relname) = ('public', 'signing_keys'))
UNION ALL
SELECT 'function', nspname || '.' || proname, true, nullif(prosrc, '')
FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace WHERE nspname = 'key_rotation'

-- name: rights
-- Each right, whether this login has it, and whether the role may have it. A login that is no member of its role would pass by the guards, which
-- ask for membership; one that is the owner counts as a person's hands.
SELECT what, has, CASE :role WHEN 'rotator' THEN rotator WHEN 'cleaner' THEN cleaner ELSE auditor END AS wanted
FROM (VALUES
    ('membership of keyrotation_rotator',    pg_has_role('keyrotation_rotator', 'USAGE'),                                           true,  false, false),
    ('membership of keyrotation_cleaner',    pg_has_role('keyrotation_cleaner', 'USAGE'),                                           false, true,  false),
    ('membership of keyrotation_auditor',    pg_has_role('keyrotation_auditor', 'USAGE'),                                           false, false, true),
    ('membership of keyrotation_owner',      pg_has_role('keyrotation_owner', 'USAGE'),                                             false, false, false),
    ('SELECT of the sealed private halves',  has_column_privilege('public.signing_keys', 'private_key_ciphertext', 'SELECT'),       false, false, false),
    ('SELECT of the canaries',               has_column_privilege('public.signing_keys', 'canaries', 'SELECT'),                     true,  false, false),
    ('SELECT of the keys',                   has_column_privilege('public.signing_keys', 'kid', 'SELECT'),                          true,  true,  true),
    ('INSERT of keys',                       has_column_privilege('public.signing_keys', 'private_key_ciphertext', 'INSERT'),       true,  false, false),
    ('UPDATE of a key''s status',            has_column_privilege('public.signing_keys', 'status', 'UPDATE'),                       true,  false, false),
    ('UPDATE of a key''s enabled',           has_column_privilege('public.signing_keys', 'enabled', 'UPDATE'),                      true,  true,  false),
    ('DELETE of keys',                       has_table_privilege('public.signing_keys', 'DELETE'),                                  false, false, false),
    ('TRUNCATE of keys',                     has_table_privilege('public.signing_keys', 'TRUNCATE'),                                false, false, false),
    ('SELECT of the rotations',              has_table_privilege('key_rotation.rotations', 'SELECT'),                               true,  true,  true),
    ('INSERT of rotations',                  has_column_privilege('key_rotation.rotations', 'kind', 'INSERT'),                      true,  false, false),
    ('UPDATE of rotations',                  has_column_privilege('key_rotation.rotations', 'epoch', 'UPDATE'),                     true,  false, false),
    ('UPDATE of the hold',                   has_column_privilege('key_rotation.environment', 'hold_reason', 'UPDATE'),             true,  false, false),
    ('SELECT of the ledger',                 has_table_privilege('key_rotation.ledger', 'SELECT'),                                  true,  true,  true),
    ('INSERT of ledger entries',             has_column_privilege('key_rotation.ledger', 'event', 'INSERT'),                        true,  true,  false),
    ('UPDATE of the ledger',                 has_any_column_privilege('key_rotation.ledger', 'UPDATE'),                             false, false, false),
    ('DELETE of ledger entries',             has_table_privilege('key_rotation.ledger', 'DELETE'),                                  false, false, false),
    ('UPDATE of the ledger''s head',         has_any_column_privilege('key_rotation.ledger_head', 'UPDATE'),                        false, false, false),
    ('CREATE in the schema key_rotation',    has_schema_privilege('key_rotation', 'CREATE'),                                        false, false, false),
    ('CREATE in the schema public',          has_schema_privilege('public', 'CREATE'),                                              false, false, false)
) AS rights (what, has, rotator, cleaner, auditor)

-- name: server
SELECT current_user AS login, current_setting('server_version') AS version, pg_is_in_recovery() AS is_replica

-- name: sealed_by
-- The versions of the sealing key that published rows still need (I24): a disabled key's ciphertext is erased.
SELECT sealed_by, count(*) AS keys FROM public.signing_keys WHERE status <> 'disabled' AND sealed_by IS NOT NULL GROUP BY sealed_by ORDER BY sealed_by
