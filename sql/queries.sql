-- The statements of the key store, each with its name and why. keyrotation/connections/queries.py reads them; parameters are :named.

-- name: say
-- What this transaction does, for the guards (rotation, epoch) and for the record (the rest). Local to the transaction.
SELECT set_config('key_rotation.actor', :actor, true), set_config('key_rotation.flow_run_id', coalesce(:flow_run_id, ''), true),
       set_config('key_rotation.rotation_id', coalesce(:rotation_id, ''), true), set_config('key_rotation.epoch', coalesce(:epoch, ''), true),
       set_config('key_rotation.reason', coalesce(:reason, ''), true), set_config('key_rotation.evidence', coalesce(:evidence, ''), true)

-- name: clock
SELECT clock_timestamp()

-- name: keys
-- Without ciphertext and canaries: nobody who looks needs them.
SELECT kid, public_jwk, status, created_at, published_at, published_seen_at, accepted_at, promoted_at, demoted_at, demoted_seen_at, retain_until,
       disabled_at, disabled_reason, compromised, never_promote, cleanup_hold, rotation_id
FROM public.signing_keys ORDER BY created_at, kid

-- name: canaries_left
SELECT kid, coalesce(jsonb_array_length(canaries), 0) - canaries_spent AS left FROM public.signing_keys WHERE canaries IS NOT NULL

-- name: environment
SELECT name, hold_reason, hold_by, held_at FROM key_rotation.environment

-- name: open_rotation
SELECT id, epoch, kind, actor, reason, opened_at, lease_until, flow_run_id, old_kid, new_kid, rolled_back, ended_at, outcome, message
FROM key_rotation.rotations WHERE ended_at IS NULL

-- name: rotation
SELECT id, epoch, kind, actor, reason, opened_at, lease_until, flow_run_id, old_kid, new_kid, rolled_back, ended_at, outcome, message
FROM key_rotation.rotations WHERE id = :id

-- name: rotations
SELECT id, epoch, kind, actor, reason, opened_at, lease_until, flow_run_id, old_kid, new_kid, rolled_back, ended_at, outcome, message
FROM key_rotation.rotations ORDER BY id DESC LIMIT :limit

-- name: open
-- One open rotation at most (a unique index); due and not on hold are asked again here, inside: the decision that led here may be old (I21).
INSERT INTO key_rotation.rotations (kind, actor, flow_run_id, reason, lease_until)
SELECT :kind, :actor, :flow_run_id, :reason, now() + :lease
WHERE NOT EXISTS (SELECT 1 FROM key_rotation.environment WHERE hold_reason IS NOT NULL)
  AND NOT EXISTS (SELECT 1 FROM public.signing_keys WHERE status = 'current' AND promoted_at > now() - cast(:due_after AS interval))
ON CONFLICT DO NOTHING
RETURNING id, epoch, kind, actor, reason, opened_at, lease_until, flow_run_id, old_kid, new_kid, rolled_back, ended_at, outcome, message

-- name: take_over
-- Only from a run that is dead (its lease is over) or from ourselves (Prefect runs the same flow run again). The new epoch shuts the old run out.
UPDATE key_rotation.rotations SET epoch = epoch + 1, actor = :actor, flow_run_id = :flow_run_id, lease_until = now() + :lease
WHERE id = :id AND epoch = :epoch AND ended_at IS NULL AND (lease_until <= now() OR flow_run_id = :flow_run_id)
RETURNING id, epoch, kind, actor, reason, opened_at, lease_until, flow_run_id, old_kid, new_kid, rolled_back, ended_at, outcome, message

-- name: fence
-- First in every write of a rotation: its row is locked until the commit, so that whoever takes over comes before or after, never between.
UPDATE key_rotation.rotations SET lease_until = greatest(lease_until, now() + :lease)
WHERE id = :id AND epoch = :epoch AND ended_at IS NULL

-- name: close
UPDATE key_rotation.rotations SET ended_at = now(), outcome = :outcome, message = :message
WHERE id = :id AND epoch = :epoch AND ended_at IS NULL
RETURNING id, epoch, kind, actor, reason, opened_at, lease_until, flow_run_id, old_kid, new_kid, rolled_back, ended_at, outcome, message

-- name: insert_key
-- Unique indexes hold the same; asked for here, the loser of a race is told so in words.
INSERT INTO public.signing_keys (kid, alg, public_jwk, private_key_ciphertext, sealed_by, canaries, rotation_id)
SELECT :kid, 'ES256', cast(:public_jwk AS jsonb), :ciphertext, :sealed_by, cast(:canaries AS jsonb), :rotation_id
WHERE NOT EXISTS (SELECT 1 FROM public.signing_keys WHERE status = 'next' OR rotation_id = :rotation_id)

-- name: name_new_key
UPDATE key_rotation.rotations SET new_kid = :kid WHERE id = :id

-- name: confirm
-- What was committed before this transaction began has been visible since now at the latest: waiting counts from here.
UPDATE public.signing_keys SET
    published_seen_at = CASE WHEN status <> 'disabled' THEN coalesce(published_seen_at, now()) ELSE published_seen_at END,
    demoted_seen_at = CASE WHEN status = 'previous' THEN coalesce(demoted_seen_at, now()) ELSE demoted_seen_at END,
    retain_until = CASE WHEN status = 'previous' THEN coalesce(retain_until, coalesce(demoted_seen_at, now()) + :retention) ELSE retain_until END,
    disabled_seen_at = CASE WHEN status = 'disabled' THEN coalesce(disabled_seen_at, now()) END
WHERE (status <> 'disabled' AND published_seen_at IS NULL) OR (status = 'previous' AND (demoted_seen_at IS NULL OR retain_until IS NULL))
   OR (status = 'disabled' AND disabled_seen_at IS NULL)

-- name: accept
UPDATE public.signing_keys SET accepted_at = now() WHERE kid = :kid AND status = 'next'

-- name: demote_current
UPDATE public.signing_keys SET status = 'previous' WHERE status = 'current' AND kid <> :kid RETURNING kid

-- name: promote
-- I6 inside the statement: published long enough, and shown to be known where that can be shown. No key was ever current: the first one has nobody to wait for.
UPDATE public.signing_keys SET status = 'current'
WHERE kid = :kid AND status = 'next' AND NOT never_promote
  AND (NOT EXISTS (SELECT 1 FROM public.signing_keys WHERE promoted_at IS NOT NULL)
       OR (published_seen_at + :wait <= now() AND (accepted_at IS NOT NULL OR NOT :proof)))

-- name: gate_is_open
-- The same question, for an authority that promotes by its own API.
SELECT EXISTS (SELECT 1 FROM public.signing_keys WHERE kid = :kid AND status = 'next' AND NOT never_promote
  AND (NOT EXISTS (SELECT 1 FROM public.signing_keys WHERE promoted_at IS NOT NULL)
       OR (published_seen_at + :wait <= now() AND (accepted_at IS NOT NULL OR NOT :proof))))

-- name: name_promoted
UPDATE key_rotation.rotations SET old_kid = coalesce(old_kid, :old_kid), new_kid = :kid WHERE id = :id

-- name: restore
-- The roll back: only a key that signed before, and whose private half is still there.
UPDATE public.signing_keys SET status = 'current' WHERE kid = :kid AND status = 'previous' AND NOT never_promote

-- name: never_promote_again
UPDATE public.signing_keys SET never_promote = true WHERE kid = :kid AND status = 'previous'

-- name: name_rolled_back
UPDATE key_rotation.rotations SET rolled_back = true WHERE id = :id

-- name: republish
UPDATE public.signing_keys SET status = 'previous' WHERE kid = :kid AND status = 'disabled' AND NOT compromised

-- name: hold_cleanup
UPDATE public.signing_keys SET cleanup_hold = :reason WHERE kid = :kid AND status = 'previous'

-- name: release_cleanups
UPDATE public.signing_keys SET cleanup_hold = NULL WHERE cleanup_hold IS NOT NULL

-- name: spend_canaries
-- Reserved before they are shown to anybody: a canary that a gateway may have seen proves nothing to a token cache.
UPDATE public.signing_keys SET canaries_spent = least(canaries_spent + :count, jsonb_array_length(canaries))
WHERE kid = :kid AND canaries IS NOT NULL RETURNING canaries_spent, canaries

-- name: spent_canary
SELECT canaries ->> 0 FROM public.signing_keys WHERE kid = :kid AND canaries IS NOT NULL AND canaries_spent > 0

-- name: clean_up
-- The runbook's own UPDATE. The key's retention is checked by the guard of the table, which this role cannot pass by.
UPDATE public.signing_keys SET enabled = FALSE
WHERE kid = :kid AND status = 'previous' AND demoted_at = :demoted_at AND retain_until <= now()

-- name: hold
UPDATE key_rotation.environment SET hold_reason = :reason, hold_by = :by, held_at = now()

-- name: release
UPDATE key_rotation.environment SET hold_reason = NULL, hold_by = NULL, held_at = NULL WHERE hold_reason IS NOT NULL

-- name: record
INSERT INTO key_rotation.ledger (rotation_id, kid, event, actor, flow_run_id, reason, evidence)
VALUES (:rotation_id, :kid, :event, :actor, :flow_run_id, :reason, cast(:evidence AS jsonb))

-- name: evidence_of
SELECT evidence FROM key_rotation.ledger WHERE rotation_id = :rotation_id AND event = :event ORDER BY seq DESC LIMIT 1

-- name: entries
SELECT seq, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS at, environment, rotation_id, kid, event, old_status, new_status,
       actor, flow_run_id, reason, evidence::text AS evidence, previous_hash, hash
FROM key_rotation.ledger WHERE seq > :after ORDER BY seq

-- name: ledger_head
SELECT seq, hash FROM key_rotation.ledger_head
