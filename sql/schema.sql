-- The truth: keys, rotations and the ledger of one environment (one database each). Run as the
-- administrator, after roles.sql. Safe to run again. What is refused here is refused for everybody, whatever the code says.
--
--     (none) --generate--> next --promote--> current --promote another--> previous --clean up--> disabled
--                            |                                               |
--                            +-------- disable by hand, emergency -----------+--> disabled
--                                            previous --roll back--> current
--
-- I-numbers are those of docs/invariants.md.

CREATE SCHEMA IF NOT EXISTS key_rotation AUTHORIZATION keyrotation_owner;
GRANT USAGE, CREATE ON SCHEMA public TO keyrotation_owner;
SET ROLE keyrotation_owner;
COMMENT ON SCHEMA key_rotation IS 'Signing key rotation: rotations, ledger, environment';

-- ------------------------------------------------------------------------------------------------ the environment

CREATE TABLE IF NOT EXISTS key_rotation.environment (
    one_row      boolean PRIMARY KEY DEFAULT true CHECK (one_row),   -- one row: a database belongs to one environment
    name         text NOT NULL CHECK (name ~ '^[a-z][a-z0-9-]{0,62}$'),
    hold_reason  text,                                            -- NULL: not on hold. A redeploy does not lift it
    hold_by      text,
    held_at      timestamptz,
    CONSTRAINT hold_is_whole CHECK ((hold_reason IS NULL) = (hold_by IS NULL) AND (hold_reason IS NULL) = (held_at IS NULL))
);

-- ------------------------------------------------------------------------------------------------ rotations

CREATE TABLE IF NOT EXISTS key_rotation.rotations (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind         text NOT NULL CHECK (kind IN ('bootstrap', 'rotation', 'standby', 'republish', 'emergency')),
    epoch        integer NOT NULL DEFAULT 1 CHECK (epoch > 0),    -- raised by whoever takes over: the fence
    opened_at    timestamptz NOT NULL DEFAULT now(),
    actor        text NOT NULL,
    flow_run_id  text,                                            -- the Prefect flow run that works on it now
    reason       text NOT NULL,
    lease_until  timestamptz NOT NULL,                            -- before this instant somebody is believed to work on it
    old_kid      text,                                            -- current when the rotation promoted
    new_kid      text,                                            -- the key it promotes
    rolled_back  boolean NOT NULL DEFAULT false,
    ended_at     timestamptz,
    outcome      text CHECK (outcome IN ('done', 'rolled back', 'unproven', 'superseded', 'failed')),
    message      text,
    CONSTRAINT ended_with_outcome CHECK ((ended_at IS NULL) = (outcome IS NULL))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_open_rotation ON key_rotation.rotations ((true)) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS rotations_by_old_kid ON key_rotation.rotations (old_kid);

-- ------------------------------------------------------------------------------------------------ the keys

CREATE OR REPLACE FUNCTION key_rotation.jwk_thumbprint(jwk jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN translate(rtrim(encode(sha256(convert_to(
        '{"crv":"P-256","kty":"EC","x":"' || (jwk ->> 'x') || '","y":"' || (jwk ->> 'y') || '"}', 'UTF8')), 'base64'), '='), '+/', '-_');
COMMENT ON FUNCTION key_rotation.jwk_thumbprint(jsonb) IS 'RFC 7638 thumbprint of a P-256 public key, base64url';

CREATE TABLE IF NOT EXISTS public.signing_keys (
    kid                     text PRIMARY KEY,
    alg                     text NOT NULL DEFAULT 'ES256',
    public_jwk              jsonb NOT NULL,
    private_key_ciphertext  bytea,                                -- PKCS8 DER, sealed with environment and kid as AAD; NULL: erased
    sealed_by               text,                                 -- the version of the key that sealed it
    status                  text NOT NULL DEFAULT 'next',
    enabled                 boolean NOT NULL DEFAULT true,        -- in the JWKS
    created_at              timestamptz NOT NULL DEFAULT now(),
    published_at            timestamptz NOT NULL DEFAULT now(),
    published_seen_at       timestamptz,                          -- …_seen_at: read in a transaction of its own after the commit was
    accepted_at             timestamptz,                          --   acknowledged; a transaction's own now() lies before anyone could see it
    promoted_at             timestamptz,                          -- accepted_at: every gateway that can be probed was shown to know the key
    demoted_at              timestamptz,
    demoted_seen_at         timestamptz,
    retain_until            timestamptz,                          -- not cleaned up before; demoted_seen_at plus the retention
    disabled_at             timestamptz,
    disabled_seen_at        timestamptz,
    disabled_reason         text,
    compromised             boolean NOT NULL DEFAULT false,       -- for ever
    never_promote           boolean NOT NULL DEFAULT false,       -- rolled back once: verifies until its tokens are dead, signs no more
    cleanup_hold            text,                                 -- why this key must not be cleaned up yet; NULL: no hold
    canaries                jsonb,                                -- signed probe tokens; readable by the rotator only
    canaries_spent          integer NOT NULL DEFAULT 0,           -- how many of them a gateway may have seen
    rotation_id             bigint
);

-- Constraints stand apart from the table, so that a table which an identity service already has gets the same ones.
-- A coordinate's last character carries four bits: with others there, one point would have several thumbprints (I3).
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT name, rule FROM (VALUES
            ('alg_is_es256', $rule$ CHECK (alg = 'ES256') $rule$),
            ('status_is_known', $rule$ CHECK (status IN ('next', 'current', 'previous', 'disabled')) $rule$),
            ('enabled_while_published', $rule$ CHECK (enabled = (status <> 'disabled')) $rule$),
            ('public_jwk_is_p256', $rule$ CHECK (coalesce(public_jwk ->> 'kty' = 'EC' AND public_jwk ->> 'crv' = 'P-256'
                AND public_jwk ->> 'x' ~ '^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$' AND public_jwk ->> 'y' ~ '^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$', false)) $rule$),
            ('public_jwk_is_public', $rule$ CHECK (public_jwk - '{kty,crv,x,y,kid,alg,use}'::text[] = '{}'::jsonb) $rule$),
            ('public_jwk_is_for_this_use', $rule$ CHECK (coalesce(public_jwk ->> 'kid' = kid AND public_jwk ->> 'alg' = 'ES256'
                AND public_jwk ->> 'use' = 'sig', false)) $rule$),
            ('kid_is_thumbprint', $rule$ CHECK (kid = key_rotation.jwk_thumbprint(public_jwk)) $rule$),
            ('compromised_is_disabled', $rule$ CHECK (NOT compromised OR status = 'disabled') $rule$),
            ('erased_when_disabled', $rule$ CHECK (status <> 'disabled' OR private_key_ciphertext IS NULL) $rule$),
            ('sealed_while_it_may_sign', $rule$ CHECK (status NOT IN ('next', 'current') OR private_key_ciphertext IS NOT NULL) $rule$),
            ('signed_once_promoted', $rule$ CHECK (status NOT IN ('current', 'previous') OR promoted_at IS NOT NULL) $rule$),
            ('demoted_when_previous', $rule$ CHECK (status <> 'previous' OR demoted_at IS NOT NULL) $rule$),
            ('made_by_rotation', $rule$ FOREIGN KEY (rotation_id) REFERENCES key_rotation.rotations (id) $rule$)
        ) AS rules(name, rule)
    LOOP
        IF NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conname = wanted.name AND conrelid = 'public.signing_keys'::regclass) THEN
            EXECUTE format('ALTER TABLE public.signing_keys ADD CONSTRAINT %I %s', wanted.name, wanted.rule);
        END IF;
    END LOOP;
END
$$;

CREATE UNIQUE INDEX IF NOT EXISTS one_current_key ON public.signing_keys ((true)) WHERE status = 'current';          -- I1
CREATE UNIQUE INDEX IF NOT EXISTS one_next_key ON public.signing_keys ((true)) WHERE status = 'next';                -- I2
CREATE UNIQUE INDEX IF NOT EXISTS one_key_per_rotation ON public.signing_keys (rotation_id);                         -- I2

-- ------------------------------------------------------------------------------------------------ the ledger

CREATE TABLE IF NOT EXISTS key_rotation.ledger (
    seq            bigint PRIMARY KEY,
    at             timestamptz NOT NULL,
    environment    text NOT NULL,
    rotation_id    bigint,
    kid            text,
    event          text NOT NULL,
    old_status     text,                                          -- old and new status: only of entries that a key's change wrote itself
    new_status     text,
    actor          text NOT NULL,
    flow_run_id    text,
    reason         text,
    evidence       jsonb NOT NULL DEFAULT '{}',
    previous_hash  text NOT NULL,
    hash           text NOT NULL UNIQUE
);
CREATE INDEX IF NOT EXISTS ledger_by_rotation ON key_rotation.ledger (rotation_id);

CREATE TABLE IF NOT EXISTS key_rotation.ledger_head (             -- its row lock puts the writers in one line: no fork (F75)
    one_row  boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    seq   bigint NOT NULL,
    hash  text NOT NULL
);
INSERT INTO key_rotation.ledger_head (seq, hash) VALUES (0, repeat('0', 64)) ON CONFLICT DO NOTHING;

CREATE OR REPLACE FUNCTION key_rotation.hashed_field(name text, value text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN name || CASE WHEN value IS NULL THEN '-' ELSE '=' || octet_length(convert_to(value, 'UTF8')) || ':' || value END || E'\n';

-- The canonical encoding: each column in table order as name=length:value, or name- for NULL. Lengths are of UTF-8 octets, so that
-- no text can pass for the next field. keyrotation/domain/ledger.py makes the same bytes.
CREATE OR REPLACE FUNCTION key_rotation.ledger_hash(entry key_rotation.ledger) RETURNS text
    LANGUAGE sql STABLE
    RETURN encode(sha256(convert_to(
        key_rotation.hashed_field('seq', entry.seq::text)
        || key_rotation.hashed_field('at', to_char(entry.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'))
        || key_rotation.hashed_field('environment', entry.environment)
        || key_rotation.hashed_field('rotation_id', entry.rotation_id::text)
        || key_rotation.hashed_field('kid', entry.kid)
        || key_rotation.hashed_field('event', entry.event)
        || key_rotation.hashed_field('old_status', entry.old_status)
        || key_rotation.hashed_field('new_status', entry.new_status)
        || key_rotation.hashed_field('actor', entry.actor)
        || key_rotation.hashed_field('flow_run_id', entry.flow_run_id)
        || key_rotation.hashed_field('reason', entry.reason)
        || key_rotation.hashed_field('evidence', entry.evidence::text)
        || key_rotation.hashed_field('previous_hash', entry.previous_hash), 'UTF8')), 'hex');

CREATE OR REPLACE FUNCTION key_rotation.chain_ledger_entry() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    head key_rotation.ledger_head;
BEGIN
    SELECT * INTO STRICT head FROM key_rotation.ledger_head FOR UPDATE;
    SELECT name INTO new.environment FROM key_rotation.environment;
    IF new.environment IS NULL THEN
        RAISE EXCEPTION 'this database has no environment name yet'
            USING HINT = 'run: INSERT INTO key_rotation.environment (name) VALUES (''production'') as the owner';
    END IF;
    new.seq := head.seq + 1;
    new.at := clock_timestamp();
    new.evidence := coalesce(new.evidence, '{}') || jsonb_build_object('db_user', session_user);
    new.previous_hash := head.hash;
    new.hash := '';
    new.hash := key_rotation.ledger_hash(new);
    UPDATE key_rotation.ledger_head SET seq = new.seq, hash = new.hash;
    RETURN new;
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.refuse_ledger_change() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the ledger is append-only: % is refused', TG_OP
        USING HINT = 'a wrong entry is answered by another entry that says so';
END
$$;

CREATE OR REPLACE TRIGGER chain_entry BEFORE INSERT ON key_rotation.ledger
    FOR EACH ROW EXECUTE FUNCTION key_rotation.chain_ledger_entry();
CREATE OR REPLACE TRIGGER append_only BEFORE UPDATE OR DELETE ON key_rotation.ledger
    FOR EACH ROW EXECUTE FUNCTION key_rotation.refuse_ledger_change();
CREATE OR REPLACE TRIGGER never_truncated BEFORE TRUNCATE ON key_rotation.ledger
    FOR EACH STATEMENT EXECUTE FUNCTION key_rotation.refuse_ledger_change();

-- ------------------------------------------------------------------------------------------------ who is acting

-- A transaction says what it does by local settings (key_rotation.actor, .rotation_id, .epoch, .flow_run_id, .reason, .evidence).
-- They are words for the record and the claim to an epoch; every rule below is checked against the tables.
CREATE OR REPLACE FUNCTION key_rotation.said(name text) RETURNS text
    LANGUAGE sql STABLE
    RETURN nullif(current_setting('key_rotation.' || name, true), '');

CREATE OR REPLACE FUNCTION key_rotation.is_by_hand() RETURNS boolean
    LANGUAGE sql STABLE
    RETURN pg_has_role(current_user, 'keyrotation_owner', 'USAGE');
COMMENT ON FUNCTION key_rotation.is_by_hand() IS 'The owner''s hands (or the administrator''s), not one of our services';

CREATE OR REPLACE FUNCTION key_rotation.holds_the_fence() RETURNS boolean
    LANGUAGE sql STABLE
    RETURN EXISTS (SELECT 1 FROM key_rotation.rotations AS open WHERE open.ended_at IS NULL
        AND open.id::text = key_rotation.said('rotation_id') AND open.epoch::text = key_rotation.said('epoch'));
COMMENT ON FUNCTION key_rotation.holds_the_fence() IS 'This transaction works on the open rotation, with its current epoch (I22)';

-- ------------------------------------------------------------------------------------------------ guards of the keys

CREATE OR REPLACE FUNCTION key_rotation.why_not_clean_up(old public.signing_keys) RETURNS text
    LANGUAGE sql STABLE
    RETURN CASE                                                                                                      -- I7, I22
        WHEN old.status <> 'previous' THEN 'it is ' || old.status || ', and only a previous key is cleaned up'
        WHEN old.retain_until IS NULL OR old.retain_until > now() THEN
            'tokens that it signed may live until ' || coalesce(old.retain_until::text, 'an instant not yet known')
        WHEN old.cleanup_hold IS NOT NULL THEN 'its cleanup is on hold: ' || old.cleanup_hold
        WHEN (SELECT hold_reason FROM key_rotation.environment) IS NOT NULL THEN 'the environment is on hold'
        WHEN EXISTS (SELECT 1 FROM key_rotation.rotations WHERE ended_at IS NULL AND kind = 'emergency') THEN 'an emergency is open'
    END;

CREATE OR REPLACE FUNCTION key_rotation.guard_new_key() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF new.status <> 'next' OR new.compromised OR NOT new.enabled THEN
        RAISE EXCEPTION 'a signing key begins its life as next' USING HINT = 'insert it with status next, then promote it';
    END IF;
    IF pg_has_role(current_user, 'keyrotation_rotator', 'USAGE') AND NOT key_rotation.is_by_hand() AND NOT key_rotation.holds_the_fence() THEN
        RAISE EXCEPTION 'superseded: this transaction does not hold the open rotation' USING ERRCODE = 'KR001';
    END IF;
    -- The rotation's own word for it is not asked: under another's number it could make a second key (I2).
    new.rotation_id := (SELECT id FROM key_rotation.rotations WHERE ended_at IS NULL);
    new.created_at := now();
    new.published_at := now();
    RETURN new;
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.guard_key_change() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    by_hand boolean := key_rotation.is_by_hand();
    by_rotator boolean := NOT by_hand AND pg_has_role(current_user, 'keyrotation_rotator', 'USAGE');
    refusal text;
BEGIN
    IF (new.kid, new.alg, new.public_jwk, new.created_at) IS DISTINCT FROM (old.kid, old.alg, old.public_jwk, old.created_at) THEN
        RAISE EXCEPTION 'the kid, algorithm and public half of signing key % never change', old.kid;                 -- I3
    END IF;
    IF old.compromised AND (new.enabled OR new.status <> 'disabled' OR NOT new.compromised) THEN                     -- I8
        RAISE EXCEPTION 'signing key % is compromised, for ever: it is never published, enabled or promoted again', old.kid;
    END IF;
    -- All that the rotator may change; but lifting a cleanup's hold is a person's word, in no rotation.             -- I22
    IF by_rotator AND NOT key_rotation.holds_the_fence()
       AND (new.status, new.enabled, new.compromised, new.never_promote, new.published_seen_at, new.accepted_at, new.demoted_seen_at,
            new.retain_until, new.disabled_seen_at, new.disabled_reason, new.canaries_spent, coalesce(new.cleanup_hold, old.cleanup_hold))
           IS DISTINCT FROM (old.status, old.enabled, old.compromised, old.never_promote, old.published_seen_at, old.accepted_at, old.demoted_seen_at,
            old.retain_until, old.disabled_seen_at, old.disabled_reason, old.canaries_spent, old.cleanup_hold) THEN
        RAISE EXCEPTION 'superseded: this transaction does not hold the open rotation' USING ERRCODE = 'KR001';
    END IF;
    IF old.never_promote AND NOT new.never_promote THEN
        RAISE EXCEPTION 'signing key % was rolled back or cleaned up once: never_promote is for good', old.kid;
    END IF;
    -- Deadlines count from these, so they are this database's now and nobody's word; retention and spent canaries only grow.   -- I6, I7, I18
    IF NOT by_hand AND ((new.published_seen_at IS DISTINCT FROM old.published_seen_at AND new.published_seen_at <> now())
                     OR (new.accepted_at IS DISTINCT FROM old.accepted_at AND new.accepted_at <> now())
                     OR (new.demoted_seen_at IS DISTINCT FROM old.demoted_seen_at AND new.demoted_seen_at <> now())
                     OR (new.disabled_seen_at IS DISTINCT FROM old.disabled_seen_at AND new.disabled_seen_at <> now())
                     OR (new.retain_until IS DISTINCT FROM old.retain_until
                         AND coalesce(new.retain_until, '-infinity') < coalesce(old.retain_until, new.demoted_seen_at, now()))
                     OR new.canaries_spent < old.canaries_spent) THEN
        RAISE EXCEPTION 'signing key %: an instant is noted as it passes, and retention and spent canaries are never taken back', old.kid;
    END IF;
    IF new.enabled AND NOT old.enabled AND new.status = old.status THEN
        RAISE EXCEPTION 'signing key % is not enabled by hand', old.kid
            USING HINT = format('to bring back a key that was cleaned up too early: keyrotation republish ENVIRONMENT %s', old.kid);
    END IF;
    IF old.enabled AND NOT new.enabled THEN                       -- the runbook's own UPDATE: what it means for the rest of the row
        new.status := 'disabled';
    END IF;
    IF new.status = old.status THEN
        RETURN new;
    END IF;

    IF (old.status, new.status) NOT IN (('next', 'current'), ('current', 'previous'), ('previous', 'current'),
                                        ('next', 'disabled'), ('previous', 'disabled'), ('disabled', 'previous')) THEN
        RAISE EXCEPTION 'signing key % is % and cannot become %', old.kid, old.status, new.status
            USING HINT = CASE WHEN old.status = 'current' THEN 'tokens are signed with it now. Rotate first (keyrotation plan shows how);'
                ' is it compromised, run the emergency-rotation deployment' END;
    END IF;
    IF old.status = 'disabled' AND NOT by_hand AND NOT by_rotator THEN
        RAISE EXCEPTION 'signing key % is disabled and not published again by %', old.kid, current_user
            USING HINT = format('to bring back a key that was cleaned up too early: keyrotation republish ENVIRONMENT %s', old.kid);
    END IF;
    IF old.status = 'disabled' AND old.promoted_at IS NULL THEN
        RAISE EXCEPTION 'signing key % never signed: there is no token that it could verify', old.kid
            USING HINT = 'a new key is made by the next rotation';
    END IF;
    IF new.status = 'disabled' THEN
        IF NOT by_hand AND NOT (new.compromised AND EXISTS (SELECT 1 FROM key_rotation.rotations WHERE ended_at IS NULL
                AND kind = 'emergency') AND key_rotation.holds_the_fence()) THEN
            refusal := key_rotation.why_not_clean_up(old);
            IF refusal IS NOT NULL THEN
                RAISE EXCEPTION 'signing key % is not cleaned up: %', old.kid, refusal USING ERRCODE = 'KR002';
            END IF;
        END IF;
        new.enabled := false;
        new.disabled_at := now();
        new.disabled_reason := coalesce(new.disabled_reason, key_rotation.said('reason'), 'by hand, by ' || session_user);
        new.private_key_ciphertext := NULL;
    ELSIF new.status = 'current' THEN
        IF new.never_promote THEN
            RAISE EXCEPTION 'signing key % was rolled back once and is never promoted again', old.kid;
        END IF;
        IF EXISTS (SELECT 1 FROM public.signing_keys AS other WHERE greatest(other.promoted_at, other.demoted_at) > now()) THEN
            RAISE EXCEPTION 'the database clock (%) lies before an earlier promotion: it went back', now()             -- F10
                USING HINT = 'set the clock of the database server right, then run the rotation again';
        END IF;
        new.promoted_at := now();
        new.demoted_at := NULL;
        new.demoted_seen_at := NULL;
        new.retain_until := NULL;
    ELSE                                                          -- previous: demoted, or published again
        new.enabled := true;
        new.demoted_at := now();
        new.demoted_seen_at := NULL;
        new.retain_until := NULL;
        IF old.status = 'disabled' THEN                           -- a key that was unpublished for a while starts anew
            new.published_at := now();
            new.published_seen_at := NULL;
            new.accepted_at := NULL;
            new.disabled_at := NULL;
            new.disabled_seen_at := NULL;
            new.disabled_reason := NULL;
            new.never_promote := true;                            -- its private half is gone
        END IF;
    END IF;
    RETURN new;
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.refuse_key_removal() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'signing keys are never deleted: the record of every kid is kept'
        USING HINT = 'to take a key out of the JWKS: UPDATE signing_keys SET enabled = FALSE WHERE kid = ''…''';
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.record_key_change() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$                                    -- I15
DECLARE
    before text := CASE WHEN TG_OP = 'UPDATE' THEN old.status END;
BEGIN
    INSERT INTO key_rotation.ledger (rotation_id, kid, event, old_status, new_status, actor, flow_run_id, reason, evidence)
    VALUES (
        coalesce(key_rotation.said('rotation_id')::bigint, (SELECT id FROM key_rotation.rotations WHERE ended_at IS NULL)),
        new.kid,
        CASE
            WHEN before IS NULL THEN 'generated'
            WHEN new.status = 'disabled' AND new.compromised THEN 'disabled as compromised'
            WHEN new.status = 'disabled' THEN 'disabled'
            WHEN before = 'disabled' THEN 'republished'
            WHEN new.status = 'previous' THEN 'demoted'
            WHEN before = 'previous' THEN 'rolled back to'
            ELSE 'promoted'
        END,
        before, new.status,
        coalesce(key_rotation.said('actor'), 'by hand: ' || session_user),
        key_rotation.said('flow_run_id'),
        coalesce(CASE WHEN new.status = 'disabled' THEN new.disabled_reason END, key_rotation.said('reason'), 'by hand'),
        coalesce(key_rotation.said('evidence')::jsonb, '{}'));
    RETURN NULL;
END
$$;

-- What changes beside the status: a cleanup's hold by anybody, anything by hand. Names the columns and never what they hold. As the caller:
-- whether it was a hand could not be told otherwise.                                                                -- I15
CREATE OR REPLACE FUNCTION key_rotation.record_key_edit() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    happened text := CASE WHEN new.cleanup_hold IS NULL AND old.cleanup_hold IS NOT NULL THEN 'cleanup released'
                          WHEN new.cleanup_hold IS DISTINCT FROM old.cleanup_hold THEN 'cleanup put on hold'
                          WHEN key_rotation.is_by_hand() THEN 'edited' END;
    edited jsonb;
BEGIN
    IF happened IS NULL THEN
        RETURN NULL;
    END IF;
    SELECT jsonb_agg(key ORDER BY key) INTO edited
    FROM jsonb_each(to_jsonb(new)) AS after JOIN jsonb_each(to_jsonb(old)) AS before USING (key) WHERE after.value <> before.value;
    INSERT INTO key_rotation.ledger (rotation_id, kid, event, actor, flow_run_id, reason, evidence)
    VALUES (key_rotation.said('rotation_id')::bigint, new.kid, happened, coalesce(key_rotation.said('actor'), 'by hand: ' || session_user),
            key_rotation.said('flow_run_id'), coalesce(new.cleanup_hold, key_rotation.said('reason'), 'by hand'),
            coalesce(key_rotation.said('evidence')::jsonb, '{}') || jsonb_build_object('columns', edited));
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.require_one_current_key() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$                                    -- I1
BEGIN
    IF EXISTS (SELECT 1 FROM public.signing_keys WHERE promoted_at IS NOT NULL)
       AND (SELECT count(*) FROM public.signing_keys WHERE status = 'current') <> 1 THEN
        RAISE EXCEPTION 'this transaction would commit without exactly one current key'
            USING HINT = 'promote another key in the same transaction', ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER guard_1_new BEFORE INSERT ON public.signing_keys
    FOR EACH ROW EXECUTE FUNCTION key_rotation.guard_new_key();
CREATE OR REPLACE TRIGGER guard_2_change BEFORE UPDATE ON public.signing_keys
    FOR EACH ROW EXECUTE FUNCTION key_rotation.guard_key_change();
CREATE OR REPLACE TRIGGER guard_3_removal BEFORE DELETE ON public.signing_keys
    FOR EACH ROW EXECUTE FUNCTION key_rotation.refuse_key_removal();
CREATE OR REPLACE TRIGGER guard_4_truncate BEFORE TRUNCATE ON public.signing_keys
    FOR EACH STATEMENT EXECUTE FUNCTION key_rotation.refuse_key_removal();
CREATE OR REPLACE TRIGGER record_new AFTER INSERT ON public.signing_keys
    FOR EACH ROW EXECUTE FUNCTION key_rotation.record_key_change();
CREATE OR REPLACE TRIGGER record_change AFTER UPDATE ON public.signing_keys
    FOR EACH ROW WHEN (old.status IS DISTINCT FROM new.status OR old.compromised IS DISTINCT FROM new.compromised)
    EXECUTE FUNCTION key_rotation.record_key_change();
CREATE OR REPLACE TRIGGER record_edit AFTER UPDATE ON public.signing_keys
    FOR EACH ROW WHEN (old.status = new.status AND old.compromised = new.compromised AND old.* IS DISTINCT FROM new.*)
    EXECUTE FUNCTION key_rotation.record_key_edit();
DROP TRIGGER IF EXISTS one_current_at_commit ON public.signing_keys;
CREATE CONSTRAINT TRIGGER one_current_at_commit AFTER INSERT OR UPDATE ON public.signing_keys
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION key_rotation.require_one_current_key();

-- ------------------------------------------------------------------------------------------------ guards of rotations and environment

CREATE OR REPLACE FUNCTION key_rotation.guard_rotation() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        RAISE EXCEPTION 'rotations are never deleted: they are the record';
    END IF;
    IF old.ended_at IS NOT NULL OR new.epoch < old.epoch OR (new.id, new.kind, new.opened_at) IS DISTINCT FROM (old.id, old.kind, old.opened_at) THEN
        RAISE EXCEPTION 'rotation % has ended, or its epoch, kind or beginning would be changed', old.id USING ERRCODE = 'KR001';
    END IF;
    RETURN new;
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.record_rotation() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    happened text := CASE WHEN TG_OP = 'INSERT' THEN 'opened' WHEN new.ended_at IS NOT NULL THEN 'closed' ELSE 'taken over' END;
BEGIN
    INSERT INTO key_rotation.ledger (rotation_id, kid, event, actor, flow_run_id, reason, evidence)
    VALUES (new.id, new.new_kid, happened, coalesce(key_rotation.said('actor'), new.actor),
            coalesce(key_rotation.said('flow_run_id'), new.flow_run_id),
            CASE WHEN happened = 'closed' THEN new.message ELSE coalesce(key_rotation.said('reason'), new.reason) END,
            coalesce(key_rotation.said('evidence')::jsonb, '{}')
                || jsonb_strip_nulls(jsonb_build_object('kind', new.kind, 'epoch', new.epoch, 'outcome', new.outcome)));
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION key_rotation.record_hold() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO key_rotation.ledger (event, actor, reason)
    VALUES (CASE WHEN new.hold_reason IS NULL THEN 'released' ELSE 'put on hold' END,
            coalesce(new.hold_by, key_rotation.said('actor'), 'by hand: ' || session_user),
            coalesce(new.hold_reason, key_rotation.said('reason')));
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER guard_change BEFORE UPDATE OR DELETE ON key_rotation.rotations
    FOR EACH ROW EXECUTE FUNCTION key_rotation.guard_rotation();
CREATE OR REPLACE TRIGGER record_opening AFTER INSERT ON key_rotation.rotations
    FOR EACH ROW EXECUTE FUNCTION key_rotation.record_rotation();
CREATE OR REPLACE TRIGGER record_change AFTER UPDATE ON key_rotation.rotations
    FOR EACH ROW WHEN (old.epoch <> new.epoch OR (old.ended_at IS NULL AND new.ended_at IS NOT NULL))
    EXECUTE FUNCTION key_rotation.record_rotation();
CREATE OR REPLACE TRIGGER record_hold AFTER UPDATE ON key_rotation.environment
    FOR EACH ROW WHEN (old.hold_reason IS DISTINCT FROM new.hold_reason)
    EXECUTE FUNCTION key_rotation.record_hold();

RESET ROLE;
