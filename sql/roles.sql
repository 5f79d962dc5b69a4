-- The roles: who may do what to the keys. Run once per cluster by a role that may create roles, before schema.sql:
--
--     psql -v ON_ERROR_STOP=1 -f sql/roles.sql -f sql/schema.sql -f sql/grants.sql -d identity_production
--
-- Passwords are the administrator's to set (\password keyrotation_rotator). A login of your own works as well:
-- make it a member (CREATE ROLE rotator_eu LOGIN IN ROLE keyrotation_rotator), the grants and the guards follow membership.

DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT name FROM (VALUES
            ('keyrotation_owner'),           -- owns tables and functions; a person's hands, never a service's
            ('keyrotation_rotator'),         -- the flows: makes, promotes, rolls back; cannot read ciphertext, cannot delete
            ('keyrotation_cleaner'),         -- the cleanup: the runbook's UPDATE and nothing else
            ('keyrotation_auditor'),         -- reads the records
            ('keyrotation_reader'),          -- the identity service: reads the keys, ciphertext included; cannot write
            ('keyrotation_identity_admin')   -- the identity service's own admin API, only where authority = "api"
        ) AS roles(name)
    LOOP
        IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = wanted.name) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', wanted.name);
        END IF;
    END LOOP;
END
$$;

-- A writer that was frozen inside a transaction must not hold its locks: an emergency would have to wait for it.
ALTER ROLE keyrotation_rotator SET transaction_timeout = '10s';
ALTER ROLE keyrotation_rotator SET lock_timeout = '3s';
ALTER ROLE keyrotation_cleaner SET transaction_timeout = '10s';
ALTER ROLE keyrotation_cleaner SET lock_timeout = '3s';
ALTER ROLE keyrotation_identity_admin SET transaction_timeout = '10s';
ALTER ROLE keyrotation_identity_admin SET lock_timeout = '3s';
ALTER ROLE keyrotation_auditor SET default_transaction_read_only = on;
ALTER ROLE keyrotation_reader SET default_transaction_read_only = on;
