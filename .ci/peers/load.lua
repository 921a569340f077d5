-- The load, for wrk: each connection says what a worker says, POST /start-request, then
-- POST /end-request, and so on.
--
-- wrk does not tell a script which connection a request is for, so where bench.py wants to know
-- how long a pair takes it gives each connection a thread: a thread has a Lua state of its own. The
-- time from one start to the next is then the time that a pair takes, with both answers read, and
-- with the connects where each call has a connection of its own.
--
-- Where a call says ID, each pair has an id of its own. An end is for the pair that began LAG pairs
-- before: with 0 on one connection, else with so many that its start has surely been answered.
--
-- Arguments: LAG; then what to ask for in turn, as "POST /start-request"; before those "close", for
-- a new connection each time. The last line of the output is JSON.
local ffi = require("ffi")
ffi.cdef("typedef struct { long seconds, nanoseconds; } Time;" ..
         "int clock_gettime(int clock, Time *time);")
local time = ffi.new("Time")
local MONOTONIC = 1
local STEPS = 50                    -- buckets of the histogram in a factor of e: 2 % each

local threads = {}

function setup(thread)
    table.insert(threads, thread)
    -- wrk asks the first thread for a request that it does not send.
    thread:set("rehearsal", #threads == 1)
end

function init(arguments)
    texts, turn, pair, last, buckets = {}, 0, 0, nil, {}
    lag = tonumber(table.remove(arguments, 1))
    -- As Go's client: more headers than Python's http.client has, fewer than Python's requests has.
    local headers = {["User-Agent"] = "Go-http-client/1.1", ["Accept-Encoding"] = "gzip"}
    for _, argument in ipairs(arguments) do
        if argument == "close" then
            headers["Connection"] = "close"
        else
            ids = ids or argument:find("ID", 1, true)
            local method, path = argument:match("(%S+) (%S+)")
            table.insert(texts, wrk.format(method, path, headers, method == "POST" and "" or nil))
        end
    end
end

function request()
    if rehearsal then
        rehearsal = false
        return texts[1]
    end
    if turn == 0 then
        ffi.C.clock_gettime(MONOTONIC, time)
        local now = tonumber(time.seconds) * 1e6 + tonumber(time.nanoseconds) / 1e3
        if last then
            local bucket = math.floor(math.log(now - last) * STEPS)
            buckets[bucket] = (buckets[bucket] or 0) + 1
        end
        last = now
    end
    local text, id = texts[turn + 1], pair
    if turn == 0 then
        pair = pair + 1
    else
        id = pair - 1 - lag
    end
    if pair > lag then
        turn = (turn + 1) % #texts
    end
    return ids and text:gsub("ID", id) or text
end

function done(summary, latency, ignored)
    local merged, count = {}, 0
    for _, thread in ipairs(threads) do
        for bucket, number in pairs(thread:get("buckets")) do
            merged[bucket] = (merged[bucket] or 0) + number
            count = count + number
        end
    end
    local order = {}
    for bucket in pairs(merged) do
        table.insert(order, bucket)
    end
    table.sort(order)
    local function percentile(part)
        local seen = 0
        for _, bucket in ipairs(order) do
            seen = seen + merged[bucket]
            if seen >= part * count then
                return math.exp((bucket + 0.5) / STEPS)
            end
        end
        return 0
    end
    local errors = summary.errors
    print(string.format(
        '\n{"requests": %d, "seconds": %.3f, "p50_us": %.1f, "p99_us": %.1f, "failed": %d}',
        summary.requests, summary.duration / 1e6, percentile(0.5), percentile(0.99),
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
