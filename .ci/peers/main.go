// Go's net/http with client_golang: go-peer PORT METRICS_PORT
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

var (
	activeGauge = promauto.NewGauge(prometheus.GaugeOpts{
		Name: "peer_active_requests", Help: "Requests in flight."})
	totalCounter = promauto.NewCounter(prometheus.CounterOpts{
		Name: "peer_requests_total", Help: "Requests started."})
	durations = promauto.NewHistogram(prometheus.HistogramOpts{
		Name: "peer_request_duration_seconds", Help: "Durations of the requests that have ended."})

	mutex  sync.Mutex
	starts []time.Time
	total  int
)

func answer(w http.ResponseWriter, status int, content map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(content)
}

func startRequest(w http.ResponseWriter, r *http.Request) {
	mutex.Lock()
	starts = append(starts, time.Now())
	total++
	active := len(starts)
	mutex.Unlock()
	totalCounter.Inc()
	activeGauge.Inc()
	answer(w, 200, map[string]any{"active_requests": active})
}

func endRequest(w http.ResponseWriter, r *http.Request) {
	var duration time.Duration
	text := r.URL.Query().Get("duration")
	if text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			answer(w, 400, map[string]any{"error": "bad duration"})
			return
		}
	}
	mutex.Lock()
	if len(starts) == 0 {
		mutex.Unlock()
		answer(w, 409, map[string]any{"error": "nothing to end"})
		return
	}
	started := starts[0]
	starts = starts[1:]
	active := len(starts)
	mutex.Unlock()
	if text == "" {
		duration = time.Since(started)
	}
	durations.Observe(duration.Seconds())
	activeGauge.Dec()
	answer(w, 200, map[string]any{"active_requests": active})
}

func metrics(w http.ResponseWriter, r *http.Request) {
	mutex.Lock()
	active, started := len(starts), total
	mutex.Unlock()
	answer(w, 200, map[string]any{
		"active_requests": active, "total_requests": started, "is_processing": active > 0})
}

func main() {
	http.HandleFunc("POST /start-request", startRequest)
	http.HandleFunc("POST /end-request", endRequest)
	http.HandleFunc("GET /metrics", metrics)
	http.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		answer(w, 200, map[string]any{"status": "ok"})
	})
	go func() {
		log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[2], promhttp.Handler()))
	}()
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
