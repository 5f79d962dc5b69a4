-- The grants: what each role may do, column by column (I17). Run after schema.sql; safe to run again.

REVOKE ALL ON SCHEMA key_rotation FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA key_rotation FROM PUBLIC;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;

GRANT USAGE ON SCHEMA key_rotation TO keyrotation_rotator, keyrotation_cleaner, keyrotation_auditor, keyrotation_reader, keyrotation_identity_admin;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA key_rotation TO keyrotation_rotator, keyrotation_cleaner, keyrotation_auditor, keyrotation_identity_admin;

-- What everybody here may read of a key: all but ciphertext and canaries.
GRANT SELECT (kid, alg, public_jwk, sealed_by, status, enabled, created_at, published_at, published_seen_at, accepted_at, promoted_at,
              demoted_at, demoted_seen_at, retain_until, disabled_at, disabled_seen_at, disabled_reason, compromised, never_promote,
              cleanup_hold, canaries_spent, rotation_id)
    ON public.signing_keys TO keyrotation_rotator, keyrotation_cleaner, keyrotation_auditor, keyrotation_reader, keyrotation_identity_admin;
GRANT SELECT ON key_rotation.environment, key_rotation.rotations, key_rotation.ledger, key_rotation.ledger_head
    TO keyrotation_rotator, keyrotation_cleaner, keyrotation_auditor;
GRANT SELECT ON key_rotation.environment, key_rotation.rotations TO keyrotation_identity_admin;
GRANT SELECT (name) ON key_rotation.environment TO keyrotation_reader;

-- The identity service: the sealed private halves.
GRANT SELECT (private_key_ciphertext) ON public.signing_keys TO keyrotation_reader, keyrotation_identity_admin;

-- The rotator: writes ciphertext without being able to read it.
GRANT SELECT (canaries) ON public.signing_keys TO keyrotation_rotator;
GRANT INSERT (kid, alg, public_jwk, private_key_ciphertext, sealed_by, canaries, rotation_id) ON public.signing_keys TO keyrotation_rotator;
GRANT UPDATE (status, enabled, published_seen_at, accepted_at, demoted_seen_at, retain_until, disabled_seen_at, disabled_reason, compromised,
              never_promote, cleanup_hold, canaries_spent) ON public.signing_keys TO keyrotation_rotator;
GRANT INSERT (kind, actor, flow_run_id, reason, lease_until) ON key_rotation.rotations TO keyrotation_rotator;
GRANT UPDATE (epoch, actor, flow_run_id, lease_until, old_kid, new_kid, rolled_back, ended_at, outcome, message)
    ON key_rotation.rotations TO keyrotation_rotator;
GRANT UPDATE (hold_reason, hold_by, held_at) ON key_rotation.environment TO keyrotation_rotator;

-- The cleaner: the runbook's UPDATE signing_keys SET enabled = FALSE, guarded by the key's own retention.
GRANT UPDATE (enabled) ON public.signing_keys TO keyrotation_cleaner;

-- The identity service's own admin API (authority = "api").
GRANT INSERT (kid, alg, public_jwk, private_key_ciphertext, sealed_by, status) ON public.signing_keys TO keyrotation_identity_admin;
GRANT UPDATE (status) ON public.signing_keys TO keyrotation_identity_admin;

-- Entries of their own: what was seen and done. Changes of keys, rotations and holds write theirs themselves.
GRANT INSERT (rotation_id, kid, event, actor, flow_run_id, reason, evidence) ON key_rotation.ledger TO keyrotation_rotator, keyrotation_cleaner;
