-- Once, as a superuser: psql --file kiln.sql, then \password kiln. One database can hold several sites; each service of
-- each has a schema of its own, which it makes itself.
CREATE ROLE kiln LOGIN CONNECTION LIMIT 90;
CREATE DATABASE kiln OWNER kiln ENCODING 'UTF8' TEMPLATE template0;
REVOKE ALL ON DATABASE kiln FROM PUBLIC;
