-- A ledger as consilium 0.1.0 wrote it: two studies, a round that was killed and repeated.
BEGIN TRANSACTION;
CREATE TABLE ledger (
	seq INTEGER NOT NULL, 
	time VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	study VARCHAR NOT NULL, 
	cohort VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	mechanism VARCHAR NOT NULL, 
	reserves INTEGER, 
	prev_hash VARCHAR NOT NULL, 
	hash VARCHAR NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "ledger" VALUES(1,'2026-01-01T00:00:00+00:00','reserve','a','members','round 1','{"kind": "dp_sgd", "noise_multiplier": 2.0, "sampling_probability": 0.25, "steps": 20, "unit": "patient"}',NULL,'0000000000000000000000000000000000000000000000000000000000000000','ebac600eb5a1b2016092f73312aab19625830639366256bb57c7d1b84c468ab5');
INSERT INTO "ledger" VALUES(2,'2026-01-01T00:00:01+00:00','commit','a','members','round 1','{"kind": "dp_sgd", "noise_multiplier": 2.0, "sampling_probability": 0.25, "steps": 20, "unit": "patient"}',1,'ebac600eb5a1b2016092f73312aab19625830639366256bb57c7d1b84c468ab5','c23e43b07f89bfff1df7a2224276f5e3f10985fc848e90e333e26788f5ad7fa5');
INSERT INTO "ledger" VALUES(3,'2026-01-01T00:00:02+00:00','reserve','a','members','round 2','{"kind": "dp_sgd", "noise_multiplier": 2.0, "sampling_probability": 0.25, "steps": 20, "unit": "patient"}',NULL,'c23e43b07f89bfff1df7a2224276f5e3f10985fc848e90e333e26788f5ad7fa5','3939216535a4f7e0ca54e25fd7cbb0843338a81859aca10e426b46cf71765d6d');
INSERT INTO "ledger" VALUES(4,'2026-01-01T00:00:03+00:00','reserve','a','members','round 2','{"kind": "dp_sgd", "noise_multiplier": 2.0, "sampling_probability": 0.25, "steps": 20, "unit": "patient"}',NULL,'3939216535a4f7e0ca54e25fd7cbb0843338a81859aca10e426b46cf71765d6d','5930576c7a1abc97e92e58cb04bdee2a3873cd29d7002cf69c1415a4e2ea06fb');
INSERT INTO "ledger" VALUES(5,'2026-01-01T00:00:04+00:00','commit','a','members','round 2','{"kind": "dp_sgd", "noise_multiplier": 2.0, "sampling_probability": 0.25, "steps": 20, "unit": "patient"}',4,'5930576c7a1abc97e92e58cb04bdee2a3873cd29d7002cf69c1415a4e2ea06fb','18de6d4791a79f737bfeca6b5aa279a4ca1b6695644e036025614c35de486f8b');
INSERT INTO "ledger" VALUES(6,'2026-01-01T00:00:05+00:00','reserve','a','nonmembers','score','{"epsilon": 0.1, "kind": "noised_counts"}',NULL,'18de6d4791a79f737bfeca6b5aa279a4ca1b6695644e036025614c35de486f8b','7beb7a9a4162df1d7a90b7d09065ddc9dfeaa7651ae2252158f6cc00099e3c72');
INSERT INTO "ledger" VALUES(7,'2026-01-01T00:00:06+00:00','commit','a','nonmembers','score','{"epsilon": 0.1, "kind": "noised_counts"}',6,'7beb7a9a4162df1d7a90b7d09065ddc9dfeaa7651ae2252158f6cc00099e3c72','d3e0e8d488084b6360f9647673422e180cad1b395075209b56f6c2a034d42657');
INSERT INTO "ledger" VALUES(8,'2026-01-01T00:00:07+00:00','reserve','b','nonmembers','utility synthetic','{"epsilon": 0.5, "kind": "noised_counts"}',NULL,'d3e0e8d488084b6360f9647673422e180cad1b395075209b56f6c2a034d42657','7d10fea4abd3013ce99f0a0e80aa7050aeae81016d2cdb1a6b835f5afc61ce90');
INSERT INTO "ledger" VALUES(9,'2026-01-01T00:00:08+00:00','commit','b','nonmembers','utility synthetic','{"epsilon": 0.5, "kind": "noised_counts"}',8,'7d10fea4abd3013ce99f0a0e80aa7050aeae81016d2cdb1a6b835f5afc61ce90','61ffb949e28484e3dc64876270377da8f0f0a0b82355f631ec21cf7955013e65');
COMMIT;
