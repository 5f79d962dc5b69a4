-- From the runbook's table to ours: for a database where an identity service already keeps its keys in
--
--     signing_keys (kid text PRIMARY KEY, alg text, public_jwk jsonb, private_key_ciphertext bytea,
--                   enabled boolean, is_current boolean, created_at timestamptz)
--
-- WHEN   Once, before schema.sql, by the administrator (superuser, or the table's owner who is a member of keyrotation_owner), together with
--        the identity service's release that reads the new columns. On a database without that table, or with one that was migrated, it does nothing.
--
--     psql -v ON_ERROR_STOP=1 -1 -d identity_production -f sql/roles.sql -f sql/migrations/0001_from_runbook_table.sql -f sql/schema.sql -f sql/grants.sql
--
--        `-1` makes it one transaction: refused anywhere, nothing was changed. Take a backup first: is_current and the erased ciphertexts do not come back.
--
-- WHAT   status        is_current → current; the newest enabled key younger than that → next; other enabled keys → previous; not enabled → disabled
--        promoted_at   the key's created_at (nobody knows better; its age is rather over- than understated), of all but the next key
--        demoted_at    of previous keys: now. Their retention is counted by the first rotation, from then on
--        ciphertext    of disabled keys: erased
--        public_jwk    kty, crv, x, y as they are; kid, alg, use added; other members dropped
--        is_current    dropped, with any index on it
--        owner         keyrotation_owner; every other role's rights on the table are taken away and named in a NOTICE
--
-- REFUSED, with the kids named, where a row cannot be one of ours: a kid that is not the RFC 7638 thumbprint, another key than ES256 on P-256, a private half
--        in public_jwk. Such keys are rotated out first: let the identity service make keys whose kid is the thumbprint, and delete the old ones' rows
--        once no token of theirs is alive. Also refused: no or several current keys, a current key that is not enabled or has no ciphertext.
--
-- AFTER  1. Name the environment, as the owner: INSERT INTO key_rotation.environment (name) VALUES ('production');
--        2. Disabled keys that were compromised are not told from others. For each, as the owner: UPDATE signing_keys SET compromised = TRUE WHERE kid = '…';
--        3. The identity service's login: GRANT keyrotation_reader TO identity_service;
--           (authority = "api", where it makes and promotes the keys itself: GRANT keyrotation_identity_admin TO identity_service;)
--
-- THE IDENTITY SERVICE must then do differently:
--        - sign with the key WHERE status = 'current', publish the keys WHERE enabled; is_current is gone
--        - write nothing, or under authority = "api" INSERT a key (it becomes next) and UPDATE status: the current key to previous, then the next key to current
--        - open a key that the rotation made with the additional authenticated data keyrotation:v1:ENVIRONMENT:KID (UTF-8); keys from before stay as they were
--          sealed: those are the ones WHERE sealed_by IS NULL

DO $$
DECLARE
    ours CONSTANT text[] := '{sealed_by,status,published_at,published_seen_at,accepted_at,promoted_at,demoted_at,demoted_seen_at,retain_until,disabled_at,'
        'disabled_seen_at,disabled_reason,compromised,never_promote,cleanup_hold,canaries,canaries_spent,rotation_id}';
    wanted CONSTANT text[] := '{kid text,alg text,public_jwk jsonb,private_key_ciphertext bytea,enabled boolean,is_current boolean,created_at timestamp with time zone}';
    found text;
    current_since timestamptz;
    grantee text;
BEGIN
    IF NOT EXISTS (SELECT 1 FROM pg_attribute WHERE attrelid = to_regclass('public.signing_keys') AND attname = 'is_current' AND NOT attisdropped) THEN
        RAISE NOTICE 'public.signing_keys is not there, or has no column is_current: nothing to migrate';
        RETURN;
    END IF;
    LOCK TABLE public.signing_keys IN ACCESS EXCLUSIVE MODE;

    -- -------------------------------------------------------------------------------------------- what is refused

    SELECT string_agg(name, ', ') INTO found FROM unnest(wanted) AS name
    WHERE name NOT IN (SELECT attname || ' ' || format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = 'public.signing_keys'::regclass AND NOT attisdropped);
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'signing_keys is not the runbook''s table: it lacks the column(s) %', found
            USING HINT = 'bring it to the shape that the head of this file shows, then run it again';
    END IF;
    SELECT string_agg(attname, ', ' ORDER BY attnum) INTO found FROM pg_attribute
    WHERE attrelid = 'public.signing_keys'::regclass AND attnum > 0 AND NOT attisdropped
      AND (attname = ANY (ours) OR (attnotnull AND NOT atthasdef AND attidentity = ''
           AND attname NOT IN ('kid', 'alg', 'public_jwk', 'private_key_ciphertext', 'enabled', 'is_current', 'created_at')));
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'signing_keys has column(s) that stand in the way: %', found
            USING HINT = 'rename those that bear a name of ours (see sql/schema.sql), and give those that must not be NULL a default';
    END IF;
    IF NOT EXISTS (SELECT 1 FROM pg_constraint WHERE conrelid = 'public.signing_keys'::regclass AND contype = 'p' AND pg_get_constraintdef(oid) = 'PRIMARY KEY (kid)') THEN
        RAISE EXCEPTION 'the primary key of signing_keys is not (kid)' USING HINT = 'make it so: two keys must never share a kid';
    END IF;

    SELECT string_agg(kid, ', ' ORDER BY kid) INTO found FROM public.signing_keys WHERE public_jwk ?| '{d,p,q,dp,dq,qi,oth,k}';
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'the PRIVATE half stands in public_jwk of key(s) %', found
            USING HINT = 'treat them as compromised: replace them, delete their rows, then run this again';
    END IF;
    SELECT string_agg(kid, ', ' ORDER BY kid) INTO found FROM public.signing_keys
    WHERE NOT coalesce(alg = 'ES256' AND public_jwk ->> 'kty' = 'EC' AND public_jwk ->> 'crv' = 'P-256'
        AND public_jwk ->> 'x' ~ '^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$' AND public_jwk ->> 'y' ~ '^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$'
        AND coalesce(public_jwk ->> 'alg', 'ES256') = 'ES256' AND coalesce(public_jwk ->> 'use', 'sig') = 'sig', false);
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'no ES256 signature key(s) on P-256: %', found
            USING HINT = 'rotate them out first; once no token of theirs is alive, delete their rows, then run this again';
    END IF;
    SELECT string_agg(kid, ', ' ORDER BY kid) INTO found FROM public.signing_keys
    WHERE kid <> coalesce(public_jwk ->> 'kid', kid)
       OR kid <> translate(rtrim(encode(sha256(convert_to('{"crv":"P-256","kty":"EC","x":"' || (public_jwk ->> 'x') || '","y":"' || (public_jwk ->> 'y') || '"}',
                                                          'UTF8')), 'base64'), '='), '+/', '-_');
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'the kid is not the RFC 7638 thumbprint of the public key: %', found
            USING HINT = 'rotate them out first, to keys whose kid is the thumbprint; once no token of theirs is alive, delete their rows, then run this again';
    END IF;

    SELECT string_agg(kid, ', ' ORDER BY kid) INTO found FROM public.signing_keys WHERE enabled IS NULL;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'enabled is neither true nor false for key(s) %', found USING HINT = 'say which: keys that are not enabled lose their private half';
    END IF;
    SELECT string_agg(kid, ', ' ORDER BY kid) INTO found FROM public.signing_keys WHERE is_current AND NOT (enabled AND private_key_ciphertext IS NOT NULL);
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'the current key cannot sign: % is not enabled, or has no ciphertext', found USING HINT = 'make the key current that signs';
    END IF;
    SELECT string_agg(kid, ', ' ORDER BY kid) INTO found FROM public.signing_keys WHERE enabled
    HAVING count(*) FILTER (WHERE is_current) <> 1 AND count(*) > 0;
    IF found IS NOT NULL THEN
        RAISE EXCEPTION 'exactly one of the enabled keys must be current, and none or several are: %', found USING HINT = 'make the one current that signs';
    END IF;

    -- -------------------------------------------------------------------------------------------- the columns

    ALTER TABLE public.signing_keys
        ADD COLUMN sealed_by          text,
        ADD COLUMN status             text NOT NULL DEFAULT 'next',
        ADD COLUMN published_at       timestamptz NOT NULL DEFAULT now(),
        ADD COLUMN published_seen_at  timestamptz,
        ADD COLUMN accepted_at        timestamptz,
        ADD COLUMN promoted_at        timestamptz,
        ADD COLUMN demoted_at         timestamptz,
        ADD COLUMN demoted_seen_at    timestamptz,
        ADD COLUMN retain_until       timestamptz,
        ADD COLUMN disabled_at        timestamptz,
        ADD COLUMN disabled_seen_at   timestamptz,
        ADD COLUMN disabled_reason    text,
        ADD COLUMN compromised        boolean NOT NULL DEFAULT false,
        ADD COLUMN never_promote      boolean NOT NULL DEFAULT false,
        ADD COLUMN cleanup_hold       text,
        ADD COLUMN canaries           jsonb,
        ADD COLUMN canaries_spent     integer NOT NULL DEFAULT 0,
        ADD COLUMN rotation_id        bigint;

    -- -------------------------------------------------------------------------------------------- the keys

    -- A created_at in the future would look like a clock that went back.
    UPDATE public.signing_keys SET created_at = least(coalesce(created_at, now()), now());
    SELECT created_at INTO current_since FROM public.signing_keys WHERE is_current;
    UPDATE public.signing_keys SET
        status = CASE WHEN NOT enabled THEN 'disabled' WHEN is_current THEN 'current' ELSE 'previous' END,
        published_at = created_at,
        public_jwk = jsonb_build_object('kty', 'EC', 'crv', 'P-256', 'x', public_jwk -> 'x', 'y', public_jwk -> 'y', 'kid', kid, 'alg', 'ES256', 'use', 'sig');
    UPDATE public.signing_keys SET status = 'next'
    WHERE kid = (SELECT kid FROM public.signing_keys
                 WHERE status = 'previous' AND created_at > current_since AND private_key_ciphertext IS NOT NULL ORDER BY created_at DESC, kid LIMIT 1);
    UPDATE public.signing_keys SET
        promoted_at = CASE WHEN status <> 'next' AND current_since IS NOT NULL THEN created_at END,
        demoted_at = CASE WHEN status = 'previous' THEN now() END,
        disabled_at = CASE WHEN status = 'disabled' THEN now() END,
        disabled_reason = CASE WHEN status = 'disabled' THEN 'disabled before keyrotation was installed' END,
        private_key_ciphertext = CASE WHEN status <> 'disabled' THEN private_key_ciphertext END;

    -- -------------------------------------------------------------------------------------------- the rest of the table

    ALTER TABLE public.signing_keys
        DROP COLUMN is_current,
        ALTER COLUMN alg SET DEFAULT 'ES256', ALTER COLUMN alg SET NOT NULL,
        ALTER COLUMN public_jwk SET NOT NULL, ALTER COLUMN public_jwk DROP DEFAULT,
        ALTER COLUMN private_key_ciphertext DROP NOT NULL, ALTER COLUMN private_key_ciphertext DROP DEFAULT,
        ALTER COLUMN enabled SET DEFAULT true, ALTER COLUMN enabled SET NOT NULL,
        ALTER COLUMN created_at SET DEFAULT now(), ALTER COLUMN created_at SET NOT NULL;

    FOR grantee IN
        SELECT DISTINCT CASE WHEN entry.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(entry.grantee)) END
        FROM pg_class, aclexplode(relacl) AS entry WHERE pg_class.oid = 'public.signing_keys'::regclass AND entry.grantee <> relowner
        UNION
        SELECT DISTINCT CASE WHEN entry.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(entry.grantee)) END
        FROM pg_attribute, aclexplode(attacl) AS entry WHERE attrelid = 'public.signing_keys'::regclass
    LOOP
        EXECUTE format('REVOKE ALL ON public.signing_keys FROM %s CASCADE', grantee);
        RAISE NOTICE 'taken away from %: its rights on signing_keys. GRANT keyrotation_reader TO the identity service''s login', grantee;
    END LOOP;
    IF pg_get_userbyid((SELECT relowner FROM pg_class WHERE oid = 'public.signing_keys'::regclass)) <> 'keyrotation_owner' THEN
        GRANT USAGE, CREATE ON SCHEMA public TO keyrotation_owner;
        ALTER TABLE public.signing_keys OWNER TO keyrotation_owner;
    END IF;
END
$$;
