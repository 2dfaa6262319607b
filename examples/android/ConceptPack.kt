// A pack of concepts: `base.bin`, a `<concept>.onnx` each and `pack.json`, as `farm export --format onnx` writes them.
// Needs the library com.microsoft.onnxruntime:onnxruntime-android, 1.18 or later.
// Read-checked only: no Kotlin compiler was at hand where this was written.

package org.e2gan.farm

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.graphics.Bitmap
import android.graphics.Color
import org.json.JSONObject
import java.io.File
import java.nio.FloatBuffer

/**
 * Concepts, loaded when they are first asked for. `folder` is a folder of the app's, not its assets: a model finds
 * `base.bin` beside itself.
 *
 * Not more than `loaded` concepts are kept, since a session holds the widened base once more (about 27 MB at full width).
 */
class ConceptPack(private val folder: File, private val loaded: Int = 2, private val threads: Int = 4) : AutoCloseable {
    private val description = JSONObject(File(folder, "pack.json").readText())
    private val environment = OrtEnvironment.getEnvironment()
    private val sessions = object : LinkedHashMap<String, OrtSession>(8, 0.75f, true) {
        override fun removeEldestEntry(eldest: MutableMap.MutableEntry<String, OrtSession>): Boolean {
            val full = size > loaded
            if (full) eldest.value.close()
            return full
        }
    }

    val side: Int = description.getInt("side")

    private val functions: Map<String, String> = description.getJSONArray("concepts").let { rows ->
        (0 until rows.length()).map(rows::getJSONObject).associate { it.getString("concept") to it.getString("function") }
    }

    val names: List<String> = functions.keys.toList()

    private fun session(concept: String): OrtSession = sessions.getOrPut(concept) {
        val file = functions[concept] ?: throw IllegalArgumentException("the pack has no concept $concept: $names")
        OrtSession.SessionOptions().use { options ->
            options.setIntraOpNumThreads(threads)
            environment.createSession(File(folder, file).path, options)
        }
    }

    /** Edits a picture: its middle, scaled to `side` pixels. Call it from one thread, not the main one. */
    fun edit(picture: Bitmap, concept: String): Bitmap {
        val edge = minOf(picture.width, picture.height)
        val middle = Bitmap.createBitmap(picture, (picture.width - edge) / 2, (picture.height - edge) / 2, edge, edge)
        val pixels = IntArray(side * side)
        Bitmap.createScaledBitmap(middle, side, side, true).getPixels(pixels, 0, side, 0, 0, side, side)
        val values = FloatBuffer.allocate(3 * pixels.size) // red, then green, then blue, 0..255
        for (pixel in pixels) values.put(Color.red(pixel).toFloat())
        for (pixel in pixels) values.put(Color.green(pixel).toFloat())
        for (pixel in pixels) values.put(Color.blue(pixel).toFloat())
        values.rewind()
        val shape = longArrayOf(1, 3, side.toLong(), side.toLong())
        OnnxTensor.createTensor(environment, values, shape).use { image ->
            session(concept).run(mapOf("image" to image)).use { results ->
                val edited = (results[0] as OnnxTensor).floatBuffer
                val n = pixels.size
                fun byte(at: Int) = edited.get(at).toInt().coerceIn(0, 255)
                for (i in 0 until n) pixels[i] = Color.rgb(byte(i), byte(n + i), byte(2 * n + i))
            }
        }
        return Bitmap.createBitmap(pixels, side, side, Bitmap.Config.ARGB_8888)
    }

    /** One line of JSON, as examples/ios/latency.swift prints them; docs/phones.md says what the keys mean. */
    fun latency(concept: String, runs: Int = 50): String {
        val picture = Bitmap.createBitmap(side, side, Bitmap.Config.ARGB_8888)
        sessions.remove(concept)?.close()
        val loading = System.nanoTime()
        edit(picture, concept)
        val first = (System.nanoTime() - loading) / 1e9
        val times = (0 until runs).map {
            val started = System.nanoTime()
            edit(picture, concept)
            (System.nanoTime() - started) / 1e6
        }.sorted()
        return JSONObject()
            .put("runtime", "onnxruntime").put("units", "cpu").put("concept", concept).put("side", side)
            .put("runs", runs).put("first_seconds", first)
            .put("median_ms", times[runs / 2]).put("p90_ms", times[runs * 9 / 10])
            .put("system", "Android ${android.os.Build.VERSION.RELEASE}, ${android.os.Build.MODEL}")
            .toString()
    }

    override fun close() = sessions.values.forEach(OrtSession::close)
}
