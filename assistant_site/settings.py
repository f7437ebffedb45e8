"""Settings of every process except the lean ones (settings_gateway.py). Each knob says its unit."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import dj_database_url

from assistant_site import env
from assistant_site.admin_site import UNFOLD as UNFOLD  # a setting of its own

BASE_DIR = Path(__file__).resolve().parent.parent
VERSION = "0.1.0"

# Before anything is opened: database, spool, logs and sockets are for this user alone.
os.umask(0o077)

ASSISTANT_HOME = env.private_folder(Path(env.text("ASSISTANT_HOME", str(BASE_DIR / "var"))).expanduser().resolve())
ASSISTANT_RUN_DIR = env.run_folder(ASSISTANT_HOME)
ASSISTANT_NODE = env.node_name(ASSISTANT_HOME)
ASSISTANT_HTTP_ADDR = env.address("ASSISTANT_HTTP_ADDR", "127.0.0.1:8080")
ASSISTANT_GRPC_ADDR = env.address("ASSISTANT_GRPC_ADDR", "127.0.0.1:50051")
ASSISTANT_ASGI_SERVER = env.choice("ASSISTANT_ASGI_SERVER", "daphne", ("daphne", "uvicorn"))
ASSISTANT_DRAIN_S = env.integer("ASSISTANT_DRAIN_S", 30, 0, 3600)  # seconds
ASSISTANT_MODEL_DIRS = env.paths("ASSISTANT_MODEL_DIRS", ASSISTANT_HOME / "models")
ASSISTANT_TRUSTED_PROXIES = env.words("ASSISTANT_TRUSTED_PROXIES")
ASSISTANT_DEMO_MODEL = env.boolean("ASSISTANT_DEMO_MODEL", True)
ASSISTANT_MAX_BODY = 32 * 1024 * 1024  # bytes of one request body
ASSISTANT_MAX_WAIT_S = 120  # seconds a non-streamed call may wait for a slot
# The console listens here and nowhere else; the gateway relays to it.
ASSISTANT_CONSOLE_SOCKET = ASSISTANT_RUN_DIR / "console.sock"
ASSISTANT_VALKEY_SOCKET = ASSISTANT_RUN_DIR / "valkey.sock"
ASSISTANT_VALKEY_PASSWORD = env.secret(ASSISTANT_HOME, "valkey_password")
ASSISTANT_SPOOL_DIR = ASSISTANT_HOME / "spool"
ASSISTANT_INSTANCES_DIR = ASSISTANT_HOME / "instances"
ASSISTANT_LOG_DIR = ASSISTANT_HOME / "logs"

# Engines that are not Python packages: programs are looked up on PATH unless absolute.
ASSISTANT_WASMEDGE = env.text("ASSISTANT_WASMEDGE", "wasmedge")
ASSISTANT_WASM_FILE = Path(env.text("ASSISTANT_WASM_FILE", str(ASSISTANT_HOME / "engines" / "llama-api-server.wasm"))).absolute()
ASSISTANT_WASM_URL = env.text(
    "ASSISTANT_WASM_URL", "https://github.com/LlamaEdge/LlamaEdge/releases/download/0.28.0/llama-api-server.wasm"
)
ASSISTANT_WASM_SHA256 = env.text("ASSISTANT_WASM_SHA256", "")  # of that release's file; nothing unpinned is run
ASSISTANT_LLAMA_SERVER = env.text("ASSISTANT_LLAMA_SERVER", "llama-server")

ASSISTANT_ENGINE_PORTS = (20000, 29999)  # loopback ports of engines; below the kernel's ephemeral range
ASSISTANT_ENGINE_DRAIN_S = 30  # seconds a stopping engine's requests get to end
ASSISTANT_ENGINE_TERM_S = 5  # seconds between TERM and KILL
ASSISTANT_ENGINE_LOG_BYTES = 8 * 1024 * 1024  # of one run of an engine
ASSISTANT_ENGINE_TRIES = 5  # failures in a row after which an instance is left alone (CRASH_LOOP)
# Seconds a request may get nowhere before its engine is taken for wedged and replaced.
ASSISTANT_ENGINE_STILL_S = env.integer("ASSISTANT_ENGINE_STILL_S", 120, 5, 86_400)  # while it does not even compute
ASSISTANT_ENGINE_SILENT_S = env.integer("ASSISTANT_ENGINE_SILENT_S", 600, 5, 86_400)  # although it computes
ASSISTANT_STOPPED_KEPT = 20  # ended instances kept per model, with their logs

SECRET_KEY = env.secret(ASSISTANT_HOME, "secret_key")
DEBUG = False
ALLOWED_HOSTS = sorted(
    {"localhost", "127.0.0.1", "[::1]", ASSISTANT_HTTP_ADDR[0], *env.words("ASSISTANT_ALLOWED_HOSTS")} - {"0.0.0.0", "::"}  # noqa: S104  # names, nothing is bound here
)
CSRF_TRUSTED_ORIGINS = env.words("ASSISTANT_TRUSTED_ORIGINS")

# REDIS_URL belongs to the operator; without it everything goes to the embedded Valkey's private socket.
_EXTERNAL_REDIS = env.redis_url("REDIS_URL")
_EMBEDDED = f":{quote(ASSISTANT_VALKEY_PASSWORD, safe='')}@{quote(str(ASSISTANT_VALKEY_SOCKET))}"
ASSISTANT_EMBEDDED_VALKEY = not _EXTERNAL_REDIS
REDIS_URL = _EXTERNAL_REDIS or f"unix://{_EMBEDDED}?db=0"
CHANNELS_REDIS_URL = _EXTERNAL_REDIS or f"unix://{_EMBEDDED}?db=2"
CELERY_BROKER_URL = _EXTERNAL_REDIS or f"redis+socket://{_EMBEDDED}?virtual_host=1"

INSTALLED_APPS = [
    "servestatic.runserver_nostatic",
    "models_app",  # before unfold: it overrides a template of it
    "unfold",
    "unfold.contrib.filters",
    "unfold.contrib.forms",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "assistant_site",
    "gateway_app",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "assistant_site.urls"
ASGI_APPLICATION = "assistant_site.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

_DATABASE_URL = env.text("DATABASE_URL", "")
if _DATABASE_URL:
    DATABASES = {"default": dict(dj_database_url.parse(_DATABASE_URL, conn_max_age=60, conn_health_checks=True))}
else:
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": ASSISTANT_HOME / "assistant.sqlite3",
            # With the default DEFERRED, concurrent writers meet "database is locked" at once; IMMEDIATE waits its turn.
            "OPTIONS": {
                "transaction_mode": "IMMEDIATE",
                "timeout": 20,  # seconds
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            },
        }
    }
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [CHANNELS_REDIS_URL], "prefix": "assistant-channels"},
    }
}

CELERY_TASK_SERIALIZER = "json"
CELERY_RESULT_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = False  # reconcile repeats what a dead worker lost
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# Seconds. Without the time-outs whoever sends a task waits for ever on a broker that hangs or whose network swallows packets;
# they must be longer than the second for which a worker's connection waits for the next task.
CELERY_BROKER_TRANSPORT_OPTIONS = {"visibility_timeout": 6 * 3600, "socket_timeout": 1.5, "socket_connect_timeout": 1.0}
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_DEFAULT_QUEUE = "control"
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_TIMEZONE = "UTC"

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = "admin:login"
LOGIN_REDIRECT_URL = "admin:index"
LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_I18N = True
USE_TZ = True
STATIC_URL = "/static/"
SERVESTATIC_USE_FINDERS = True
SERVESTATIC_ALLOW_ALL_ORIGINS = False

# Behind TLS a trusted proxy (and our own gateway) says so in this header; the gateway drops the client's own.
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SECURE_CONTENT_TYPE_NOSNIFF = True
X_FRAME_OPTIONS = "DENY"

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "models_app.api.authentication.KeyAuthentication",  # first: its challenge is what a 401 carries
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["models_app.api.permissions.MayAdminister"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["models_app.api.parsing.StrictJSONParser"],
    "DEFAULT_PAGINATION_CLASS": "models_app.api.listing.Pages",
    "DEFAULT_FILTER_BACKENDS": ["models_app.api.listing.QueryFilter", "rest_framework.filters.OrderingFilter"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "models_app.api.errors.handle",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Assistant admin API",
    "DESCRIPTION": "Operate the platform: models, processes, keys. Use a session of the admin, or a key with the scope admin.",
    "VERSION": VERSION,
    "SERVE_INCLUDE_SCHEMA": False,
    "SCHEMA_PATH_PREFIX": r"/api/v1/",
    "COMPONENT_SPLIT_REQUEST": True,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": env.text("ASSISTANT_LOG_LEVEL", "INFO").upper()},
    "loggers": {"httpx": {"level": "WARNING"}, "httpcore": {"level": "WARNING"}},
}
